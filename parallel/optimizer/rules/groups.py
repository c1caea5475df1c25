"""Groups of parameters: those of some names have constants and learning rates of their own.

Pure; importing it needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from holdfast.parallel.optimizer.rules.rule import BlockUpdate, OptimizerRule

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

    def place(self, parameter: Parameter) -> tuple[int, bool]:
        """The group of a parameter, and whether weight decay applies to it. Pure."""
        number = self.number(parameter.name)
        return number, parameter.decay or self.groups[number].all_decay

    def update(self, updates: Sequence[BlockUpdate], step: Tensor, lr: float) -> None:
        """Update blocks in place, each as its group has it. Local; exact-mode safe.

        State of fewer bits is rounded once, to the nearest, ties to even.

        Args:
            step: the number of this update, as for `OptimizerRule.update_blocks`.
            lr: the learning rate of the step, without the groups' factors.
        """
        for number, group in enumerate(self.groups):
            chosen = [update for update in updates if update.group == number]
            rate = lr * group.rate_factor
            if chosen and all(values.dtype == u.master.dtype for u in chosen for values in u.state):
                self.rule.update_blocks(chosen, step, rate, group.settings)
                continue
            for rounded in chosen:
                # As many bits as master values have while it is computed; one block at a time.
                state = tuple(values.to(rounded.master.dtype) for values in rounded.state)
                full = replace(rounded, state=state)
                self.rule.update_blocks([full], step, rate, group.settings)
                for kept, values in zip(rounded.state, state, strict=True):
                    kept.copy_(values)


def matched_by_none(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The patterns that match none of the names. Pure."""
    return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
