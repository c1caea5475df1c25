"""The state before each of the last updates, in host memory, so that these can be taken back.

Of each of a rank's own blocks and of those that it shadows there is a plain copy. Parameters that
are the rounding of a master copy, or another rank's, are not kept: they are gathered from their
owners again. The difference (XOR) of two steps would have as many bytes, and would have to be
applied once for each step. Local; exact-mode safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.parallel.optimizer import MASTER, ShadowState, ShardedOptimizer
from holdfast.trainer.step.vote import StepProgress


@dataclass(frozen=True, slots=True)
class KeptState:
    """The state of one rank after some steps."""

    progress: StepProgress
    copies: tuple[Tensor, ...] | None
    """The values of `live_state`; None: no update followed, so they are those that followed."""


def live_state(optimizer: ShardedOptimizer, shadows: ShadowState | None) -> list[Tensor]:
    """All that an update changes on a rank, but for parameters that others can give it: views."""
    owned = optimizer.owned_state
    found = [owned.step, *(v for values in owned.kinds.values() for v in values.tensors)]
    if MASTER not in owned.kinds:
        found += [optimizer.parameters(number) for number in range(len(optimizer.owned))]
    if shadows is not None:
        copies = shadows.copies
        found += [copies.step, *(v for values in copies.kinds.values() for v in values.tensors)]
        found += () if copies.rounded is None else copies.rounded.tensors
    return found


class StateHistory:
    """The state of one rank before each of its last decided steps. Local."""

    def __init__(self, depth: int) -> None:
        """Nothing is kept yet.

        Args:
            depth: the number of steps that can be taken back; 0: none.
        """
        self._depth = depth
        self._kept: deque[KeptState] = deque()
        self._free: list[tuple[Tensor, ...]] = []
        """Memory that has been used for copies."""
        self._before: StepProgress | None = None
        self._present: tuple[Tensor, ...] | None = None
        """The state before steps that are only tried, and not kept; None: none are."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps after which the state is known, ascending."""
        return tuple(kept.progress.decided for kept in self._kept)

    @property
    def is_trial(self) -> bool:
        """Whether steps are only tried, so that nothing is kept."""
        return self._present is not None

    def deciding(self, progress: StepProgress) -> None:
        """Note the progress before a step is decided."""
        if self._depth and not self.is_trial:
            self._before = replace(progress)

    def keep(self, live: Sequence[Tensor] | None) -> None:
        """Keep the state before the decided step.

        Args:
            live: as of `live_state`, before the update; None: the step changes nothing.
        """
        if self._before is None:
            return
        while len(self._kept) >= self._depth:
            self._forget(self._kept.popleft())
        copies = None if live is None else self._copied(live)
        self._kept.append(KeptState(self._before, copies))
        self._before = None

    @contextmanager
    def trial(self, live: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Keep nothing within the block. Gives a copy of the state before it."""
        self._present = self._copied(live)
        try:
            yield self._present
        finally:
            self._free.append(self._present)
            self._present = None

    def _copied(self, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A copy in host memory, page-locked for what lies on a GPU."""
        if self._free:
            copies = self._free.pop()
        else:
            copies = tuple(
                torch.empty_like(values, device="cpu", pin_memory=values.device.type == "cuda")
                for values in live
            )
        for kept, values in zip(copies, live, strict=True):
            kept.copy_(values, non_blocking=True)  # in order with the update on the same stream
        return copies

    def find(self, step: int) -> KeptState:
        """The state after `step` steps; without copies, it is the live one.

        Raises:
            KeyError: it is not known.
        """
        place = self.steps.index(step) if step in self.steps else -1
        if place < 0:
            raise KeyError(step)
        later = (kept.copies for kept in list(self._kept)[place:] if kept.copies is not None)
        return replace(self._kept[place], copies=next(later, self._present))

    def forget_from(self, step: int) -> None:
        """Forget the states after `step` steps and more, which the run reaches again."""
        while self._kept and self._kept[-1].progress.decided >= step:
            self._forget(self._kept.pop())

    def _forget(self, kept: KeptState) -> None:
        if kept.copies is not None:
            self._free.append(kept.copies)


def restore(live: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Set all that an update changes to what was copied of it."""
    for values, kept in zip(live, copies, strict=True):
        values.copy_(kept)
