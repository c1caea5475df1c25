"""Groups of parameters: those of some names have constants and learning rates of their own.

Pure; importing it needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from holdfast.parallel.layout import Box, HeadRows
from holdfast.parallel.optimizer.rules.clip import HeadFactors, scale_of
from holdfast.parallel.optimizer.rules.rule import (
    BlockUpdate,
    MatrixBox,
    OptimizerRule,
    by_matrix,
)

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class ParameterGroup(Generic[S]):
    """The parameters of some names, and what an update uses for them."""

    patterns: tuple[str, ...]
    """Their logical names; `*` stands for anything, as in names of files."""
    settings: S
    """The rule's constants."""
    rate_factor: float = 1.0
    """What the learning rate of a step is multiplied by."""
    all_decay: bool = False
    """Whether weight decay applies to parameters of every shape; else to those of the table."""

    def has(self, name: str) -> bool:
        """Whether a parameter of this name is matched. Pure."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


class Parameter(Protocol):
    """What is asked of a row of the parameter table."""

    @property
    def name(self) -> str: ...
    @property
    def decay(self) -> bool: ...
    @property
    def box(self) -> Box: ...
    @property
    def whole(self) -> Box | None: ...
    @property
    def balance(self) -> float | None: ...
    @property
    def heads(self) -> HeadRows | None: ...


class Place(NamedTuple):
    """What an update needs to know of a block's parameter."""

    group: int
    """The number of its group."""
    decays: bool
    """Whether weight decay applies."""
    matrix: MatrixBox | None
    """Where it lies in a matrix that is updated as one."""
    balance: float | None = None
    """As of `ParameterSpec`."""
    heads: tuple[HeadRows, Box] | None = None
    """As of `BlockUpdate`."""


@dataclass(frozen=True, slots=True)
class ParameterGroups(Generic[S]):
    """A rule's groups of parameters, in their order; the last one has what no other matches."""

    rule: OptimizerRule[S]
    groups: tuple[ParameterGroup[S], ...]

    @classmethod
    def of(cls, rule: OptimizerRule[S], section: Any) -> ParameterGroups[S]:
        """From the `[optimizer]` section, which has the groups and what the others get. Pure."""
        found = [
            ParameterGroup(
                table.patterns,
                rule.settings(table.within(section)),
                1.0 if table.lr is None else table.lr / section.lr,
                table.weight_decay is not None,
            )
            for table in section.groups
        ]
        return cls(rule, (*found, ParameterGroup(("*",), rule.settings(section))))

    def number(self, name: str) -> int:
        """The group of a parameter: the first one that its name matches. Pure."""
        return next(number for number, group in enumerate(self.groups) if group.has(name))

    def place(self, parameter: Parameter, box: Box | None = None) -> Place:
        """What an update needs to know of a block of a parameter. Pure.

        Args:
            box: the block's in the logical tensor; None: all that the parameter has of it.
        """
        number = self.number(parameter.name)
        whole, matrix = parameter.whole, None
        if whole is not None and self.rule.matrices is not None and parameter.balance is None:
            rows, columns = whole.shape
            matrix = MatrixBox(rows, columns, parameter.box.relative_to(whole))
        decays = parameter.decay or self.groups[number].all_decay
        rows = parameter.heads
        heads = None if rows is None else (rows, box or parameter.box)
        return Place(number, decays, matrix, parameter.balance, heads)

    def update(
        self,
        updates: Sequence[BlockUpdate],
        step: Tensor,
        lr: float,
        factors: HeadFactors = MappingProxyType({}),
    ) -> None:
        """Update blocks in place, each as its group has it. Local; exact-mode safe.

        State of fewer bits is rounded once, to the nearest, ties to even.

        Args:
            updates: those of a split matrix one after another.
            step: the number of this update, as for `OptimizerRule.update_blocks`.
            lr: the learning rate of the step, without the groups' factors.
            factors: those of heads that are clipped, for a rule that does so.
        """
        of_matrices = self.rule.matrices
        for number, group in enumerate(self.groups):
            chosen = [_scaled(update, factors) for update in updates if update.group == number]
            rate = lr * group.rate_factor
            biases = [update for update in chosen if update.balance is not None]
            matrices = [update for update in chosen if update.matrix is not None]
            elements = [u for u in chosen if u.matrix is None and u.balance is None]
            _update(self.rule.update_blocks, elements, step, rate, group.settings)
            _update(self.rule.balance, biases, step, rate, group.settings)
            if of_matrices is not None:
                _update(of_matrices.update, matrices, step, rate, group.settings)


def _scaled(update: BlockUpdate, factors: HeadFactors) -> BlockUpdate:
    """The update with the scale of its heads, if some of them are clipped."""
    if update.heads is None or update.heads[0].layer not in factors:
        return update
    of_heads = factors[update.heads[0].layer]
    return replace(update, scale=scale_of(*update.heads, of_heads, update.master))


def _update(
    rule: Callable[[Sequence[BlockUpdate], Tensor, float, S], None],
    updates: Sequence[BlockUpdate],
    step: Tensor,
    lr: float,
    settings: S,
) -> None:
    """Update blocks, whose state may have fewer bits than master values, by one rule."""
    if all(values.dtype == u.master.dtype for u in updates for values in u.state):
        if updates:
            rule(updates, step, lr, settings)
        return
    for rounded in by_matrix(updates):
        # As many bits as master values have while it is computed; one block or matrix at a time.
        full = [
            replace(u, state=tuple(values.to(u.master.dtype) for values in u.state))
            for u in rounded
        ]
        rule(full, step, lr, settings)
        for update, computed in zip(rounded, full, strict=True):
            for kept, values in zip(update.state, computed.state, strict=True):
                kept.copy_(values)


def matched_by_none(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The patterns that match none of the names. Pure."""
    return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
