"""The reference for layouts: the unsharded model under a plain autograd loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import ParameterSpec, Slices, slices_of
from holdfast.parallel.optimizer import OPTIMIZERS, ParameterGroups
from holdfast.parallel.pipeline import Chunk, MicroBatchContext, TokensKey
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.check.capture import (
    ActivationRecorder,
    CapturedBox,
    RankCapture,
    captured_box,
    watch_chunk,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Dataset
from holdfast.trainer.models import build_whole_model, family_of
from holdfast.trainer.step import layers_of_config, open_split


def run_reference(config: RunConfig) -> RankCapture:
    """Train all steps in this process: autograd, clip_grad_norm_, the rule's reference. Local.

    Every gradient comes from autograd itself: no accumulator, reduction, optimizer shard or
    schedule of a run is involved.
    """
    train = config.train
    capture = RankCapture()
    chunk = build_whole_model(
        config.model,
        dtype=PRECISIONS[train.precision].dtype,
        device=torch.device("cpu"),
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        seed=train.seed,
    )
    rows = [(spec, parameter) for (*_, spec), parameter in chunk.rows()]
    tied = _tied(rows)
    second_uses = {second for _, second in tied}
    loads = {parameter for spec, parameter in rows if spec.balance is not None}
    parameters = list(dict.fromkeys(p for _, p in rows if p not in second_uses | loads))
    segments = [_Segment.of(spec, p) for spec, p in rows if p not in second_uses]
    optimizers = _optimizers(config, segments)
    data = open_split(config, "train")
    running = [0]
    recorder = ActivationRecorder(capture, lambda: running[0], _slices(config).own)
    watch_chunk(recorder, chunk, config.model.hidden)
    for step in range(train.steps):
        chunk.zero_grad()
        logits: dict[TokensKey, Tensor] = {}
        capture.losses.append(_backward_passes(config, chunk, data, step, running, logits))
        for first, second in tied:
            assert first.grad is not None
            assert second.grad is not None
            first.grad += second.grad
            second.grad = None
        if step == 0:
            recorder.close()
            capture.gradients = _pieces(rows, second_uses, gradients=True)
        clip = train.clip_grad_norm or float("inf")
        capture.grad_norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        for segment in segments:
            segment.take_gradient()
        for optimizer, factor in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.rate_of(step) * factor
            optimizer.step()
        _clip(segments, logits, config)
        for segment in segments:
            segment.write()
        for first, second in tied:
            second.data.copy_(first.data)
    capture.parameters = _pieces(rows, second_uses, gradients=False)
    return capture


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """A logical tensor in a local parameter, which may have several of them."""

    spec: ParameterSpec
    local: nn.Parameter
    own: nn.Parameter
    """A parameter of its own, in the same memory at first."""

    @classmethod
    def of(cls, spec: ParameterSpec, local: nn.Parameter) -> _Segment:
        rows = local.detach()[spec.local_row : spec.local_row + spec.rows]
        return cls(spec, local, nn.Parameter(rows))

    def take_gradient(self) -> None:
        """Give `own` its part of the gradient."""
        assert self.local.grad is not None
        first = self.spec.local_row
        self.own.grad = self.local.grad[first : first + self.spec.rows]

    def write(self) -> None:
        """Set its part of the local parameter, which an optimizer may have left as it was."""
        first = self.spec.local_row
        self.local.data[first : first + self.spec.rows].copy_(self.own.data)


class _Balance(torch.optim.Optimizer):
    """The rule of biases that even the loads of experts, by its definition."""

    def __init__(self, biases: nn.Parameter, speed: float) -> None:
        super().__init__([biases], {"lr": 0.0})
        self._biases, self._speed = biases, speed

    @torch.no_grad()
    # pyrefly: ignore[bad-override]
    def step(self, closure: Any = None) -> None:
        loads = self._biases.grad
        assert loads is not None
        shares = loads.tolist()
        for place, load in enumerate(shares):
            above = load * len(shares) - sum(shares)
            self._biases[place] -= self._speed * ((above > 0) - (above < 0))


def _optimizers(
    config: RunConfig, segments: Sequence[_Segment]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """The rule's reference for each group of parameters, and the factor of its learning rate."""
    rule = OPTIMIZERS[config.optimizer.name]
    groups = ParameterGroups.of(rule, config.optimizer)
    tables = [table for layer in layers_of_config(config) for table in layer.parameters]
    whole = {spec.name for table in tables for spec in table if spec.whole}
    places = {
        found.own: groups.place(
            replace(found.spec, whole=found.spec.box if found.spec.name in whole else None)
        )
        for found in segments
    }
    references = [(rule.reference, False)]
    if rule.matrices is not None:
        references.append((rule.matrices.reference, True))
    found: list[tuple[torch.optim.Optimizer, float]] = [
        (_Balance(own, place.balance), 1.0)
        for own, place in places.items()
        if place.balance is not None
    ]
    for (number, group), (reference, matrices) in product(enumerate(groups.groups), references):
        members = [
            (
                [
                    parameter
                    for parameter, place in places.items()
                    if place.balance is None
                    and (place.group, place.decays) == (number, decays)
                    and (place.matrix is not None) is matrices
                ],
                decays,
            )
            for decays in (True, False)
        ]
        if any(own for own, _ in members):
            found.append((reference(members, group.settings), group.rate_factor))
    return found


def _backward_passes(
    config: RunConfig,
    chunk: Chunk,
    data: Dataset,
    step: int,
    running: list[int],
    logits: dict[TokensKey, Tensor],
) -> float:
    """Add the gradients of a step's mean loss to `grad`. Returns that loss.

    Args:
        running: gets the number of the computed micro-batch as its one item.
        logits: gets what attention notes.
    """
    train = config.train
    predicted = max(1, data.predicted(step, global_batch=train.global_batch))
    total = 0.0
    for micro_batch in range(train.global_batch // train.micro_batch):
        running[0] = micro_batch
        batch = data.batch(
            step,
            micro_batch,
            global_batch=train.global_batch,
            micro_batch_size=train.micro_batch,
        )
        context = MicroBatchContext(
            step,
            micro_batch,
            True,
            batch,
            1.0 / predicted,
            train.z_loss_coef,
            _slices(config),
            logits=logits if config.optimizer.qk_clip else None,
        )
        losses = chunk(None, context)
        (losses.sum() / predicted).backward()
        # Those of further tokens stand behind that of the next ones, of each slice.
        total += losses.view(context.slices.count, -1)[:, 0].sum().item()
    return total / predicted


@torch.no_grad()
def _clip(
    segments: Sequence[_Segment], logits: Mapping[TokensKey, Tensor], config: RunConfig
) -> None:
    """QK-clip by its definition: head after head."""
    for segment in segments:
        heads = segment.spec.heads
        noted = [found for key, found in logits.items() if heads and key.layer == heads.layer]
        if heads is None or not noted:
            continue
        rows = segment.own.movedim(heads.dim, 0)
        size = sum(count for count, _ in heads.powers)
        for head, largest in enumerate(torch.stack(noted).amax(0).tolist()):
            place = head * size + heads.first - segment.spec.box.start[heads.dim]
            for count, power in heads.powers:
                if largest > config.optimizer.qk_clip:
                    rows[place : place + count] *= (config.optimizer.qk_clip / largest) ** power
                place += count


def _slices(config: RunConfig) -> Slices:
    """One slice, but for experts: the loss of their router is defined slice by slice."""
    if not family_of(config.model.family).experts(config.model):
        return Slices()
    return slices_of(config.train.seq_len, config.train.context_chunks, 1, 0)


def _tied(
    rows: list[tuple[ParameterSpec, nn.Parameter]],
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(first use, second use) of tied weights."""
    first = {spec.name: parameter for spec, parameter in rows if spec.tied_use == 0}
    return [(first[spec.name], parameter) for spec, parameter in rows if spec.tied_use]


def _pieces(
    rows: list[tuple[ParameterSpec, nn.Parameter]], skipped: set[nn.Parameter], *, gradients: bool
) -> list[CapturedBox]:
    """The boxes of all rows but second uses of tied weights: gradients, or parameters."""
    pieces = []
    for spec, parameter in rows:
        if parameter in skipped:
            continue
        values = parameter.grad if gradients else parameter
        assert values is not None
        matrix = values[spec.local_row : spec.local_row + spec.rows]
        pieces.append(captured_box(spec, matrix))
    return pieces
