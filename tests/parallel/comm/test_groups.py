"""A rank's groups go from one generation to the next together, whatever carries their messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
from torch.distributed import HashStore

from holdfast.parallel.comm.flight_recorder import FlightRecorder
from holdfast.parallel.comm.groups import Groups, build_groups, edit_groups
from holdfast.parallel.comm.p2p_collectives import PairwiseCommunicator
from holdfast.parallel.comm.protocol import AbortSignal, MembershipChange
from holdfast.parallel.errors import PeerLost


class AgreeingTransport(PairwiseCommunicator):
    """A group of one rank over a transport whose edits need agreement, as MPI's do."""

    def __init__(self, signal: AbortSignal) -> None:
        super().__init__("world", (0,), 0, signal, FlightRecorder(0))
        self.reasons: list[str | None] = []
        """Why the old generation was aborted, as seen at each edit."""

    @property
    def edit_needs_agreement(self) -> bool:
        return True

    def _message(self, *arguments: object, **options: object) -> NoReturn:
        raise AssertionError("a group of one sends no message")

    def edit(
        self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal
    ) -> AgreeingTransport:
        self.reasons.append(self.signal.reason)
        self._enter(signal)
        return self


def _alone(generation: int = 0) -> Groups:
    axes = {"tensor": (0,), "pipeline": (0,)}
    return build_groups(
        HashStore(), "127.0.0.1", 0, (0,), axes, backend="gloo", generation=generation
    )


def _edit(groups: Groups, generation: int) -> Groups:
    return edit_groups(groups, MembershipChange(generation), (0,), dict.fromkeys(groups.axes, (0,)))


def test_all_groups_of_an_edit_share_the_new_generation() -> None:
    before = _alone()
    after = _edit(before, 3)
    assert after.generation == 3
    assert after.recorder.record().generation == 3
    for group in (after.world, after.control, after["tensor"], after["pipeline"]):
        assert group.signal is after.signal
    assert after.world is before.world
    assert after["tensor"] is before["tensor"]


def test_an_abort_reaches_further_groups_and_ends_with_the_edit() -> None:
    groups = _alone()
    assert groups.is_whole
    extra = groups.extra("beside", (0,))
    groups.abort("a drill")
    assert not groups.is_whole
    with pytest.raises(PeerLost, match="a drill"):
        extra.signal.check()
    edited = _edit(groups, 1)
    assert edited.is_whole
    edited.extra("beside", (0,)).signal.check()
    edited.world.all_reduce(torch.ones(1)).wait()


def test_the_store_of_a_change_is_where_the_new_generation_connects() -> None:
    groups, store = _alone(), HashStore()
    change = MembershipChange(1, store=store)
    edited = edit_groups(groups, change, (0,), dict.fromkeys(groups.axes, (0,)))
    assert edited.mesh is not None
    assert edited.mesh._shared_store is store


@pytest.mark.parametrize("reason", [None, "a drill"])
def test_a_transport_that_needs_agreement_is_edited_after_the_vote(reason: str | None) -> None:
    groups = _alone()
    world = AgreeingTransport(groups.signal)
    groups = replace(groups, world=world)
    if reason is not None:
        groups.abort(reason)
    edited = _edit(groups, 1)
    assert world.reasons == [reason]
    assert edited.world is world
    assert world.signal is edited.signal


def test_a_rank_alone_over_mpi_has_no_further_groups() -> None:
    groups = replace(_alone(), mesh=None)
    assert not groups.is_whole
    with pytest.raises(AssertionError, match="votes_over_gloo"):
        groups.extra("beside", (0,))
