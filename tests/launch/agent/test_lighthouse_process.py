"""When a Lighthouse that has outlived its node ends: with the test's clock."""

from __future__ import annotations

from holdfast.elastic.generation import Identity
from holdfast.elastic.lighthouse import LighthouseAway
from holdfast.launch.agent.lighthouse_process import SILENCE_S, wait_for_silence
from support.processes.fake_clock import FakeClock

RECENT_S = 1.2


def test_a_lighthouse_stays_while_any_worker_lives_and_ends_after_a_silence() -> None:
    clock = FakeClock()
    begin = clock()

    def ages() -> dict[Identity, float]:
        since_s = clock() - begin
        if 10 < since_s < 12:
            raise LighthouseAway("it did not answer this once")
        return {Identity(0): since_s, Identity(1): max(0.1, since_s - 60)}

    wait_for_silence(ages, RECENT_S, clock=clock, sleep=clock.sleep)
    assert 60 + SILENCE_S <= clock() - begin < 60 + SILENCE_S + 3


def test_a_lighthouse_of_which_no_worker_has_heard_ends_after_a_silence() -> None:
    clock = FakeClock()
    begin = clock()
    wait_for_silence(dict, RECENT_S, clock=clock, sleep=clock.sleep)
    assert SILENCE_S <= clock() - begin < SILENCE_S + 1
