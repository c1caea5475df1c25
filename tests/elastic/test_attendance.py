"""How long an agreement waits for members that are missing from its rounds."""

from __future__ import annotations

from holdfast.elastic.agreement import AcceptorState, Attendance, Report
from holdfast.elastic.generation import Identity
from support.processes.fake_clock import FakeClock

MEMBERS = frozenset(Identity(rank) for rank in range(4))
FIRST, WORKS, ENDED, UNHEARD = sorted(MEMBERS)
PATIENCE_S, LIMIT_S = 5.0, 100.0


def test_a_member_is_missed_once_nothing_is_heard_of_it_and_one_at_work_near_the_limit() -> None:
    clock = FakeClock()
    began_s = clock()
    attendance = Attendance(PATIENCE_S, LIMIT_S, clock)
    acceptor = AcceptorState(1, MEMBERS)
    heard = {
        FIRST: Report(FIRST, acceptor),
        WORKS: Report(WORKS, acceptor, settled=True),
        ENDED: Report(ENDED, acceptor, alive=False),
    }
    missed: dict[Identity, float] = {}
    while clock() < began_s + LIMIT_S:
        attendance.note(heard)
        for identity in attendance.overdue(MEMBERS):
            missed.setdefault(identity, clock() - began_s)
        clock.now_s += 0.25
    assert missed == {UNHEARD: PATIENCE_S + 0.25, WORKS: 0.8 * LIMIT_S + 0.25}
    attendance.begin_again()
    clock.now_s += PATIENCE_S
    assert not attendance.overdue(MEMBERS)
