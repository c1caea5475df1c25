"""How long a connection waits for its other side, and what it leaves: with the test's clock."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from holdfast.parallel.comm.gloo_connection import Rendezvous
from holdfast.parallel.comm.protocol import AbortSignal
from holdfast.parallel.errors import PeerLost
from support.processes.fake_clock import FakeClock

LIMIT_S = 600.0


def side_of(store: HashStore, signal: AbortSignal, clock: FakeClock) -> Rendezvous:
    side = Rendezvous(store, "line", signal, LIMIT_S, clock=clock, sleep=clock.sleep)
    side.set("mine", b"address")
    return side


def test_a_side_waits_until_the_limit_and_takes_its_address_back() -> None:
    clock, store = FakeClock(), HashStore()
    begin = clock()
    with pytest.raises(RuntimeError, match="the peer did not come within 600 s"):
        side_of(store, AbortSignal(0), clock).wait(["theirs"])
    assert clock() - begin == pytest.approx(LIMIT_S, abs=0.1)
    assert not store.check(["line/mine"])


def test_a_side_whose_address_was_claimed_goes_on_beyond_the_limit() -> None:
    clock, store = FakeClock(), HashStore()
    begin = clock()
    side = side_of(store, AbortSignal(0), clock)
    store.delete_key("line/mine")
    sleep = clock.sleep

    def and_come(seconds: float) -> None:
        sleep(seconds)
        if clock() > begin + 2 * LIMIT_S and not store.check(["line/theirs"]):
            store.set("line/theirs", "their address")

    side._sleep = and_come
    side.wait(["theirs"])
    assert side.get("theirs") == b"their address"
    assert clock() - begin > 2 * LIMIT_S


def test_an_abort_ends_the_wait_at_once() -> None:
    clock, store, signal = FakeClock(), HashStore(), AbortSignal(0)
    begin = clock()
    signal.abort("rank 3 is lost")
    with pytest.raises(PeerLost, match="rank 3 is lost"):
        side_of(store, signal, clock).wait(["theirs"])
    assert clock() - begin < 0.1
