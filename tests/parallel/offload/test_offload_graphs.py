"""Random small autograd graphs: offloaded, they have the gradients, and the errors, of ordinary
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.offload import Bounds, Offloader

SIDE = 8

OPERATIONS: dict[str, Callable[[list[Tensor], int, int], Tensor | None]] = {
    "multiply": lambda t, a, b: t[a] * t[b],
    "matmul": lambda t, a, b: t[a] @ t[b],
    "sigmoid": lambda t, a, b: t[a].sigmoid(),
    "softmax": lambda t, a, b: t[a].softmax(-1),
    "transpose": lambda t, a, b: t[a].t(),
    "half": lambda t, a, b: t[a][: SIDE // 2].repeat(2, 1),
    "part": lambda t, a, b: t[a].chunk(2)[b % 2].exp().repeat(2, 1),
    "expand": lambda t, a, b: t[a][:1].expand(SIDE, SIDE),
    "flip": lambda t, a, b: t[a].view(-1).flip(0).view(SIDE, SIDE),
    "double": lambda t, a, b: (t[a].double() * 2).float(),
    "detach": lambda t, a, b: t[a].detach().square(),
    "in place": lambda t, a, b: t[a].mul_(0.5),
    "in place by": lambda t, a, b: t[a].add_(t[b]),
    "row in place": lambda t, a, b: t[a][b % SIDE].mul_(2.0).expand(SIDE, SIDE),
    "activation in place": lambda t, a, b: torch.relu_(t[a]),
    "recompute": lambda t, a, b: checkpoint(_recomputed, t[a], t[b], use_reentrant=False),
}


def _recomputed(a: Tensor, b: Tensor) -> Tensor:
    return (a.tanh() * b) @ b.t()


def graph(program: list[tuple[str, int, int]]) -> tuple[Tensor, list[Tensor]]:
    """The sum of all that a program makes, and the leaves it starts from."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(SIDE, SIDE, generator=generator).requires_grad_() for _ in range(3)]
    tensors = [leaf * 0.5 for leaf in leaves] + [torch.randn(SIDE, SIDE, generator=generator)]
    for name, a, b in program:
        made = OPERATIONS[name](tensors, a % len(tensors), b % len(tensors))
        if made is not None:
            tensors.append(made)
    return torch.stack([tensor.sum() for tensor in tensors]).sum(), leaves


def gradients(program: list[tuple[str, int, int]], around: Any, drain: Any) -> list[Any] | str:
    """What autograd gives, or how it refuses."""
    try:
        with around:
            total, leaves = graph(program)
        drain()
        total.backward()
    except RuntimeError as error:
        changed = "modified by an inplace operation"
        return changed if changed in str(error) else str(error)
    return [leaf.grad for leaf in leaves]


def equal(one: list[Any] | str, other: list[Any] | str) -> bool:
    """Bit for bit."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    pairs = zip(one, other, strict=True)
    return all(a is b or torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


_PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 30), st.integers(0, 30)),
    max_size=14,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=_PROGRAMS, drained=st.booleans(), share=st.sampled_from([0.3, 1.0]))
@pytest.mark.parametrize("where", ["ssd", "host"])
def test_any_graph_has_the_gradients_and_the_errors_of_torch(
    where: str, tmp_path: Path, program: list[tuple[str, int, int]], drained: bool, share: float
) -> None:
    plain = gradients(program, nullcontext(), lambda: None)
    # Where a view's base was changed in place, hooks of any kind let torch make the view's node
    # earlier, which changes the order, and the last bits, of sums: bits are compared with hooks
    # that do nothing.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    hooked = gradients(program, hooks, lambda: None)
    path = tmp_path if where == "ssd" else None
    offloader = Offloader(path, smallest_bytes=1, bounds=Bounds(share, share))
    try:
        found = gradients(program, offloader, offloader.drain if drained else lambda: None)
    finally:
        offloader.close()
    assert equal(found, plain if isinstance(plain, str) else hooked)
