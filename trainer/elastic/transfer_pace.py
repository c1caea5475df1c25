"""The pace of background transfers: when incoming state may be complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from holdfast.elastic import MembershipHistory
from holdfast.trainer.step import Training


class AgreementCheck(Protocol):
    """The check that ranks can agree now; `holdfast.elastic.membership.Membership`."""

    def can_agree(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class MembershipPace:
    """The `TransferPace` of one training: it asks the membership, or the repeated run."""

    training: Training
    rank: int
    membership: AgreementCheck
    history: MembershipHistory | None = None
    """The changes of the run that this one repeats, at the same steps; None: none."""

    def must_end(self) -> bool | None:
        """Whether the repeated run had all state in place after the step under way."""
        if self.history is None:
            return None
        return self.history.filled_after(self.training.progress.decided + 1)

    def may_end(self) -> bool:
        """Whether the ranks can agree; only the first rank of the plan asks."""
        first = self.training.plan.stage_replicas.ranks[0]
        return self.rank != first or self.membership.can_agree()
