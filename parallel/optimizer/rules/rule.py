"""The definition of an optimizer: its kinds of state for a parameter, and its update.

An optimizer is an `OptimizerRule` in a file of its own and one line in registry.py. The sharded
optimizer, shadows, state transfer, checkpoints, converters and memory estimates iterate over its
kinds. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from holdfast.parallel.layout import Box, HeadRows
from holdfast.parallel.plan import update_ends
from holdfast.parallel.precision import Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

S = TypeVar("S")
MASTER = "master"
"""The kind of the values that an update changes, in the precision of the optimizer's state.

They are the parameters themselves, or a copy if the parameters have fewer bits.
"""

AVERAGE = "ema"
"""The kind of the moving average of master values, which any optimizer may keep."""


@dataclass(frozen=True, slots=True)
class StateKind:
    """A tensor that the optimizer keeps for each parameter, of its shape.

    Shadows keep every kind: they apply each update, as owners do.
    """

    name: str
    """The name in files: "exp_avg"."""
    initial: float = 0.0
    """The value of each element before the first update."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == MASTER:
            raise ValueError(
                f"a kind of state is named {self.name!r}; names of tensors and of files are made "
                f"of it: use letters, digits and underscores, and not {MASTER!r}"
            )


@dataclass(frozen=True, slots=True)
class MatrixBox:
    """The place of a block in a matrix that is updated as one."""

    rows: int
    """Those of the matrix."""
    columns: int
    box: Box
    """The box of the matrix that the block has: all of it, or one of a split matrix."""

    @property
    def elements(self) -> int:
        """Those of the matrix."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """The input of an update for one block: flat tensors of equal length and dtype."""

    master: Tensor
    """The master values, changed in place."""
    gradient: Tensor
    state: tuple[Tensor, ...]
    """One tensor per kind, in the rule's order; changed in place."""
    decays: bool
    """Whether weight decay applies."""
    group: int = 0
    """The number of its parameter's group."""
    matrix: MatrixBox | None = None
    """Where it lies in a matrix that is updated as such; None: elementwise."""
    balance: float | None = None
    """As of `ParameterSpec`; the block has the biases of all loads."""
    heads: tuple[HeadRows, Box] | None = None
    """The heads whose queries or keys it makes, and its box in its logical tensor."""
    scale: Tensor | None = None
    """What the box is multiplied by after this update; None: nothing."""


def by_matrix(updates: Sequence[BlockUpdate]) -> Iterator[Sequence[BlockUpdate]]:
    """The blocks of each matrix: they follow each other. Others are alone. Pure."""
    shares = ((u.box.elements, u.elements) if u else (1, 1) for u in (x.matrix for x in updates))
    start = 0
    for end in sorted(set(update_ends(shares))):
        yield updates[start:end]
        start = end


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key of `[optimizer]` that one optimizer has beside those of all."""

    name: str
    type: Any
    """The type of its values, as msgspec reads it."""
    default: Any


def no_problems(section: Any) -> Iterator[str]:
    """No rule beside those of all optimizers. Pure."""
    return iter(())


@dataclass(frozen=True, slots=True)
class MatrixRule(Generic[S]):
    """The update of the matrices of transformer layers."""

    update: Callable[[Sequence[BlockUpdate], Tensor, float, S], None]
    """As `OptimizerRule.update_blocks`, for blocks with a `matrix`: all of a matrix, one after
    another."""
    reference: Callable[[Sequence[tuple[list[nn.Parameter], bool]], S], torch.optim.Optimizer]
    """As `OptimizerRule.reference`, for these parameters."""


_EVEN = 2.0**-20
"""The share of the mean by which a load may differ from it and count as even: clipping scales and
rounds the loads with the gradients."""


def balance_blocks(updates: Sequence[BlockUpdate], step: Tensor, lr: float, settings: Any) -> None:
    """Change each bias towards even loads (Wang et al. 2024, "Auxiliary-loss-free load balancing").

    As `OptimizerRule.update_blocks`, for blocks with a `balance`. Exact-mode safe.
    """
    for update in updates:
        loads = update.gradient.double()
        mean = loads.mean()
        below = mean - loads
        signs = below.sign().mul_(below.abs() > mean * _EVEN)
        update.master.add_(signs.to(update.master.dtype) * (update.balance or 0.0))


@dataclass(frozen=True, slots=True)
class OptimizerRule(Generic[S]):
    """An optimizer. `S` is the type of its constants."""

    name: str
    """The value of `optimizer.name`."""
    kinds: tuple[StateKind, ...]
    settings: Callable[[Any], S]
    """Makes the constants from the `[optimizer]` section."""
    update_blocks: Callable[[Sequence[BlockUpdate], Tensor, float, S], None]
    """(blocks, number of this update as float32 scalar, counted from 1; learning rate; constants).

    Changes the blocks in place. Elementwise, or at least independent of how blocks are grouped:
    owners and shadows group them differently and must get the same bits. Local.
    """
    reference: Callable[[Sequence[tuple[list[nn.Parameter], bool]], S], torch.optim.Optimizer]
    """Makes an independent implementation that `holdfast check` compares with.

    From groups of (parameters, whether weight decay applies). The learning rate is set before each
    step."""
    matrices: MatrixRule[S] | None = None
    """The update of matrices, if it is another; None: it is that of all blocks."""
    balance: Callable[[Sequence[BlockUpdate], Tensor, float, S], None] = balance_blocks
    """The update of biases that even loads: the same for every optimizer."""
    constants: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """The keys of all optimizers that it uses."""
    own_keys: tuple[OwnKey, ...] = ()
    problems: Callable[[Any], Iterator[str]] = no_problems
    """(`[optimizer]` section) -> the broken rules of its own keys, one line each."""
    in_checks: Mapping[str, Any] = field(default_factory=dict)
    """The values that own keys have in `holdfast check`, where rounding must hide nothing."""


@dataclass(frozen=True, slots=True)
class StateFormat:
    """The optimizer state of a run: the kinds of a rule, in the precision of the state."""

    rule: OptimizerRule[Any]
    precision: Precision
    """The precision of training."""
    on_host: bool = False
    """Whether the owned state lies in host memory, and is updated there."""
    moments: Precision | None = None
    """The precision of the rule's kinds but the average; None: that of the state."""

    @property
    def held(self) -> tuple[str, ...]:
        """The kinds of a held block, in the order in which they are sent."""
        return (MASTER, *(kind.name for kind in self.rule.kinds))

    @property
    def saved(self) -> tuple[str, ...]:
        """The kinds in a checkpoint beside the weights; master values only if these differ."""
        return self.held if self.precision.has_master else self.held[1:]

    def precision_of(self, kind: str) -> Precision:
        """The precision of a kind's values."""
        full = self.precision.state
        return full if kind in (MASTER, AVERAGE) else self.moments or full

    @property
    def held_bytes(self) -> int:
        """The bytes of a held block's values, per element of it."""
        return sum(self.precision_of(kind).bytes for kind in self.held)

    @property
    def saved_bytes(self) -> int:
        """The bytes per parameter in a checkpoint beside the weights."""
        return sum(self.precision_of(kind).bytes for kind in self.saved)

    @property
    def owned_bytes(self) -> int:
        """The bytes kept per owned parameter: the reduced gradient and `saved`."""
        return self.precision.state.bytes + self.saved_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of master values and reduced gradients."""
        return self.precision.state.dtype
