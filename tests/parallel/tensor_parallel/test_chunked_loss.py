"""The loss by chunks of the vocabulary, beside torch's cross-entropy over whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.parallel.layout import Box, HeldRow, Initial, ParameterSpec
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    Weight,
    chunked_cross_entropy_sum,
    column_linear,
    cross_entropy_sum,
)

SEQ, BATCH, HIDDEN, VOCAB = 6, 3, 8, 67
SCALE = 0.37
"""The gradient of the loss: no power of two."""
NEAR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def inputs(dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, nn.Parameter, Tensor]:
    """Hidden states, the head's weight, targets; the first, the last and one other row are hit."""
    random = torch.Generator().manual_seed(5)
    value = torch.randn(SEQ, BATCH, HIDDEN, generator=random).mul_(spread).to(dtype)
    weight = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=random).to(dtype))
    targets = torch.randint(0, VOCAB, (SEQ, BATCH), generator=random)
    targets[0] = torch.tensor([0, VOCAB - 1, VOCAB // 2])
    return value.requires_grad_(), weight, targets


def loss_of(
    value: Tensor, weight: nn.Parameter, targets: Tensor, chunk: int, queue: Any = None
) -> Tensor:
    tp = TensorParallel(None, False)
    queue = queue or WeightGradientQueue()
    return chunked_cross_entropy_sum(value, [weight], queue, targets, [0], tp, chunk)


def expected(dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, from the inputs as they are in `dtype`: the loss and its gradients."""
    value, weight, targets = inputs(dtype, spread)
    wide, matrix = (x.detach().double().requires_grad_() for x in (value, weight))
    logits = F.linear(wide, matrix).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss.backward(torch.tensor(SCALE, dtype=torch.float64))
    assert wide.grad is not None
    assert matrix.grad is not None
    return loss.detach(), wide.grad, matrix.grad


def assert_near(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=NEAR[dtype] * scale)


@pytest.mark.parametrize("spread", [1.0, 300.0], ids=["", "large logits"])
@pytest.mark.parametrize("dtype", list(NEAR), ids=str)
@pytest.mark.parametrize("chunk", [1, 8, 66, 67, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(
    dtype: torch.dtype, chunk: int, spread: float
) -> None:
    value, weight, targets = inputs(dtype, spread)
    loss = loss_of(value, weight, targets, chunk)
    loss.backward(torch.tensor(SCALE, dtype=torch.float64))
    of_loss, of_value, of_weight = expected(dtype, spread)
    assert value.grad is not None
    assert weight.grad is not None
    assert loss.dtype == torch.float64
    assert_near(loss.detach(), of_loss, dtype)
    assert_near(value.grad, of_value, dtype)
    assert_near(weight.grad, of_weight, dtype)


def accumulating(weight: nn.Parameter, *, exact: bool) -> tuple[GradientAccumulator, Any]:
    spec = ParameterSpec(
        name="head",
        shape=tuple(weight.shape),
        box=Box((0, 0), tuple(weight.shape)),
        local="head",
        local_row=0,
        initial=Initial("constant", 0.0),
        decay=True,
        copies=(0,),
    )
    row = HeldRow(0, 0, 0, spec)
    buffer = ParameterBuffer([(row, weight)], dtype=weight.dtype, device=torch.device("cpu"))
    queue = WeightGradientQueue()
    sums = GradientAccumulator(buffer, exact=exact, fraction_bits=44, queues=[queue])
    return sums, queue


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_split_backward_pass_gives_the_same_bits(dtype: torch.dtype, exact: bool) -> None:
    found = []
    for deferred in (False, True):
        value, weight, targets = inputs(dtype)
        sums, queue = accumulating(weight, exact=exact)
        for micro_batch in range(2):  # the second is added to the first
            sums.begin_gradients(micro_batch)
            loss = loss_of(value, weight, targets, 16, queue)
            if deferred:
                with queue.deferred() as kept:
                    loss.backward(torch.tensor(SCALE, dtype=torch.float64))
                assert (micro_batch, 0) not in sums.included.get(weight, ())
                queue.run(kept)
            else:
                loss.backward(torch.tensor(SCALE, dtype=torch.float64))
        assert sums.included == {weight: {(0, 0), (1, 0)}}
        assert weight.grad is None
        assert value.grad is not None
        found.append((value.grad, sums.sums.one.clone()))
        if exact:
            _, _, of_weight = expected(dtype)
            whole = sums.part(0, weight.numel()).double().mul_(2.0**-44).view_as(of_weight)
            assert_near(whole, 2 * of_weight, dtype)
    (value, sums), (value_split, sums_split) = found
    assert torch.equal(value, value_split)
    assert torch.equal(sums, sums_split)


def test_a_micro_batch_that_is_included_still_gives_the_gradient_of_its_input() -> None:
    gradients = []
    for skipped in (False, True):
        value, weight, targets = inputs(torch.float32)
        sums, queue = accumulating(weight, exact=True)
        sums.skip({weight: {(0, 0)}} if skipped else {})
        sums.begin_gradients(0)
        loss_of(value, weight, targets, 16, queue).backward()
        assert bool(sums.sums.one.any()) is not skipped
        assert value.grad is not None
        gradients.append(value.grad)
    assert torch.equal(gradients[0], gradients[1])


class _LargestTensor(TorchDispatchMode):
    """Notes the most elements of a tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_are_never_whole_and_nothing_of_them_is_kept() -> None:
    chunk = 16
    value, weight, targets = inputs(torch.float32)
    _, queue = accumulating(weight, exact=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    largest = _LargestTensor()
    with largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(value, weight, targets, chunk, queue)
        with queue.deferred() as deferred:
            loss.backward()
        queue.run(deferred)
    tokens = SEQ * BATCH
    assert largest.elements == max(weight.numel(), tokens * chunk) < tokens * VOCAB
    buffers = {x.untyped_storage().data_ptr() for x in (value, weight)}
    statistics = [size for place, size in kept.items() if place not in buffers]
    assert sum(statistics) == tokens * (8 + 4 + 4)  # the target, the largest logit, the sum


@pytest.mark.parametrize("chunk", [0, 7])
def test_the_z_loss_is_in_the_gradient_and_not_in_the_loss(chunk: int) -> None:
    """By its definition under autograd; ignored places have none."""
    value, weight, targets = inputs(torch.float64)
    ignored = torch.zeros(SEQ, BATCH, dtype=torch.bool)
    ignored[1] = True
    wide, matrix = (x.detach().clone().requires_grad_() for x in (value, weight))
    logits = F.linear(wide, matrix)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    plain = (plain.view(SEQ, BATCH) * ~ignored).sum()
    squares = (logits.logsumexp(-1).square() * ~ignored).sum()
    ((plain + 0.05 * squares) * SCALE).backward()
    tp, queue = TensorParallel(None, False), WeightGradientQueue()
    if chunk:
        loss = chunked_cross_entropy_sum(
            value, [weight], queue, targets, [0], tp, chunk, ignored, 0.05
        )
    else:
        [ours] = column_linear(value, [[Weight(weight, queue)]], tp)
        loss = cross_entropy_sum([ours], targets, [0], tp, ignored, 0.05)
    loss.backward(torch.tensor(SCALE, dtype=torch.float64))
    torch.testing.assert_close(loss, plain.detach())
    for ours, theirs in ((value, wide), (weight, matrix)):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_near(ours.grad, theirs.grad, torch.float64)
