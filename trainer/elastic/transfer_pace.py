"""When the state that comes to newcomers beside the steps may be complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from holdfast.elastic import MembershipHistory
from holdfast.trainer.step import Training


class AgreementCheck(Protocol):
    """Whether ranks can agree on a change; `holdfast.elastic.membership.Membership`."""

    def can_agree(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class MembershipPace:
    """The `TransferPace` of one training: it asks the membership, or the run that is repeated."""

    training: Training
    rank: int
    membership: AgreementCheck
    history: MembershipHistory | None = None
    """Of the run whose changes this one repeats, at the same steps."""

    def must_end(self) -> bool | None:
        """Whether the run that is repeated had all state in place after the step under way."""
        if self.history is None:
            return None
        return self.history.filled_after(self.training.progress.decided + 1)

    def may_end(self) -> bool:
        """Whether the ranks can agree; the first rank of the plan alone asks."""
        first = self.training.plan.stage_replicas.ranks[0]
        return self.rank != first or self.membership.can_agree()
