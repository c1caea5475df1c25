"""The offloader's parts: stores, and the order in which things come back."""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from time import sleep

import pytest
import torch
from torch import Tensor

from holdfast.parallel.errors import OffloadError
from holdfast.parallel.offload.hooks.prefetch import Prefetch
from holdfast.parallel.offload.hooks.program import backward_order, reversed_at_once
from holdfast.parallel.offload.hooks.record import Record
from holdfast.parallel.offload.stores.disk_file import DiskFile, RateLimit
from holdfast.parallel.offload.stores.disk_store import DiskStore
from holdfast.parallel.offload.stores.host_store import HostStore
from holdfast.parallel.offload.stores.reused_memory import ReusedMemory
from holdfast.parallel.offload.stores.staged_store import StagedStore
from holdfast.parallel.offload.stores.store import Store, StoredCopy
from holdfast.parallel.schedules import Action
from support.processes.fake_clock import FakeClock

CPU = torch.device("cpu")
STAGING = 1 << 18


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DiskFile]:
    file = DiskFile(tmp_path)
    yield file
    file.close()


@pytest.fixture(params=["disk", "host", "staged"])
def store(request: pytest.FixtureRequest, file: DiskFile) -> Store:
    if request.param == "disk":
        return DiskStore(file)
    if request.param == "host":
        return HostStore(CPU)
    return StagedStore(file, CPU, staging_bytes=STAGING)


def content(nbytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def until(condition: Callable[[], bool], store: Store) -> None:
    while not condition():
        store.advance()
        sleep(1e-4)


def put(store: Store, source: Tensor) -> StoredCopy:
    copy = store.put(source)
    assert copy is not None
    return copy


@pytest.mark.parametrize("fetched", [True, False])
def test_a_store_gives_back_what_it_took(store: Store, fetched: bool) -> None:
    sources = [content(n, seed) for seed, n in enumerate((1, 4096, 50_001, 65_536))]
    copies = [put(store, source.clone()) for source in sources]
    for copy in copies:
        until(lambda copy=copy: copy.source_free, store)
    for source, copy in zip(reversed(sources), reversed(copies), strict=True):
        if fetched:
            until(copy.fetch, store)
        assert torch.equal(copy.take(), source)
        until(copy.release, store)
    assert store.statistics().used_bytes == 0
    assert store.statistics().written_bytes >= sum(source.numel() for source in sources)
    assert store.fault == ""


def test_a_store_can_be_left_at_any_time(store: Store) -> None:
    for seed in range(20):
        copy = put(store, content(20_000, seed))
        until(copy.release, store)
        assert copy.release()
    for seed in range(20):
        copy = put(store, content(20_000, seed))
        until(lambda copy=copy: copy.source_free, store)
        copy.fetch()
        until(copy.release, store)
    assert store.statistics().used_bytes == 0


def test_what_comes_back_is_aligned_as_it_was(file: DiskFile) -> None:
    store = DiskStore(file)
    for skip in (0, 64, 960, 4032):
        memory = content(20_000)
        source = memory[(skip - memory.data_ptr()) % 4096 :][:9000]
        copy = put(store, source)
        until(lambda copy=copy: copy.source_free, store)
        assert copy.take().data_ptr() % 4096 == source.data_ptr() % 4096 == skip


def test_memory_is_used_again_when_its_last_tensor_is_gone() -> None:
    memory = ReusedMemory()
    first = memory.take(100, 5000)
    assert first.data_ptr() % 4096 == 100
    part = first[4000:].view(10, 100)
    place = first.data_ptr()
    del first
    other = memory.take(100, 5000)
    assert other.data_ptr() != place
    del part
    assert memory.take(100, 5000).data_ptr() == place
    room = memory.room_bytes
    large = memory.take(0, 2 * room)
    assert memory.room_bytes > 2 * room
    memory.trim()
    del large
    memory.trim()
    assert other.sum() >= 0
    assert memory.room_bytes == room
    del other
    memory.trim()
    assert memory.room_bytes == 0


def test_staging_memory_is_bounded_and_reads_go_before_it(file: DiskFile) -> None:
    store = StagedStore(file, CPU, staging_bytes=STAGING)
    sources = [content(STAGING // 2, seed) for seed in range(3)]
    copies = [put(store, source.clone()) for source in sources[:2]]
    assert store.put(sources[2]) is None
    until(lambda: all(copy.source_free for copy in copies), store)
    until(lambda: not any(copy.moving for copy in store._moving), store)
    waiting = [put(store, sources[2].clone()), put(store, sources[2].clone())]
    # All staging memory is taken, which must not keep back what is waited for.
    assert torch.equal(copies[0].take(), sources[0])
    for copy in (*copies, *waiting):
        until(copy.release, store)


def test_what_cannot_be_written_stays_in_staging(file: DiskFile) -> None:
    store = StagedStore(file, CPU, staging_bytes=STAGING)
    file.engine.inject("write", 0, errno.EIO)
    source = content(10_000)
    copy = put(store, source.clone())
    until(lambda: store.fault != "", store)
    assert copy.source_free
    assert torch.equal(copy.take(), source)
    assert store.put(source) is None
    until(copy.release, store)


def test_staged_reads_are_repeated_once(file: DiskFile) -> None:
    store = StagedStore(file, CPU, staging_bytes=STAGING)
    source = content(10_000)
    copies = [put(store, source.clone()) for _ in range(2)]
    until(lambda: not store._moving, store)
    file.engine.inject("read", 0, errno.EIO)
    assert torch.equal(copies[0].take(), source)
    file.engine.inject("read", 0, errno.EIO, 2)
    with pytest.raises(OffloadError, match="cannot be read back"):
        copies[1].take()


def test_a_kept_rate_is_kept(tmp_path: Path) -> None:
    file = DiskFile(tmp_path, bytes_per_s=1e6)
    store = DiskStore(file)
    copies = [put(store, content(8192, seed)) for seed in range(4)]
    for copy in copies:
        until(lambda copy=copy: copy.source_free, store)
    statistics = store.statistics()
    # On a busy machine a write may take longer than the rate alone says, and never less.
    assert statistics.busy_s > 0.999 * statistics.written_bytes / 1e6 > 0
    store.close()
    store.close()


def test_transfers_are_due_one_after_the_other_and_a_rest_is_not_made_up_for() -> None:
    clock = FakeClock(now_s=100.0)
    rate = RateLimit(1e6, clock=clock, pause=clock.sleep)
    dues = [rate.due_s(2_000_000) for _ in range(3)]
    assert dues == [102.0, 104.0, 106.0]
    assert not rate.is_past(dues[0])
    rate.wait(dues[1])
    assert clock() == 104.0
    assert rate.is_past(dues[1])
    assert not rate.is_past(dues[2])
    clock.sleep(100.0)
    assert rate.due_s(1_000_000) == 205.0
    assert rate.busy_s == 7.0
    without = RateLimit(0.0, clock=clock, pause=clock.sleep)
    assert without.is_past(without.due_s(1 << 40))
    assert without.busy_s == 0.0


class Order:
    """A prefetch whose fetches are noted by (key, place)."""

    def __init__(self) -> None:
        self.fetched: list[tuple[Hashable, int]] = []
        self.prefetch = Prefetch(self._note)
        self.records: dict[tuple[Hashable, int], Record] = {}

    def _note(self, record: Record) -> bool:
        key = next(key for key, known in self.records.items() if known is record)
        self.fetched.append(key)
        return True

    def forward(self, key: Hashable, count: int) -> None:
        scope = self.prefetch.open(key)
        for place in range(count):
            tensor = torch.empty(100, dtype=torch.uint8)
            record = Record(tensor, tensor.untyped_storage(), deque())
            self.records[key, place] = record
            scope.add(record)
        scope.complete = True

    def ask(self, key: Hashable, place: int, window: int) -> None:
        self.prefetch.asked(self.records[key, place])
        self.prefetch.advance(window)


def test_what_is_needed_next_comes_back_across_micro_batches() -> None:
    order = Order()
    order.prefetch.expect(["a", "b", "c"])
    for key in "ab":
        order.forward(key, 3)
    order.prefetch.advance(250)
    assert order.fetched == [("a", 2), ("a", 1), ("a", 0)]
    order.prefetch.backward("a")
    order.prefetch.advance(250)
    assert len(order.fetched) == 3
    order.ask("a", 2, 250)
    order.ask("a", 1, 250)
    assert order.fetched[3:] == [("b", 2), ("b", 1)]
    order.ask("a", 0, 1000)
    # The forward pass of "c" has not been: nothing beyond "b" can come.
    assert order.fetched[5:] == [("b", 0)]
    order.forward("c", 1)
    order.prefetch.backward("b")
    order.ask("b", 2, 1000)
    assert order.fetched[6:] == [("c", 0)]
    assert order.prefetch.ahead_bytes == 300


def test_what_nobody_needs_is_passed_over() -> None:
    order = Order()
    order.prefetch.expect(["a"])
    order.forward("a", 4)
    gone = weakref.ref(order.records.pop(("a", 2)))
    assert gone() is None
    order.prefetch.backward("a")
    order.prefetch.advance(1000)
    assert order.fetched == [("a", 3), ("a", 1), ("a", 0)]


def test_a_program_says_what_comes_back_when_and_what_at_once() -> None:
    text = "0F0 0F1 0SEND_F1>1 0RECV_B0<1 0I0 0F2 0SEND_F2>1 0I2 0W0 0B1 0W2"
    program = tuple(Action.parse(action) for action in text.split())
    assert backward_order(program) == [(0, 0, None), (0, 2, None), (0, 1, None)]
    assert reversed_at_once(program) == {(0, 2, None)}
    stretched = tuple(Action.parse(action) for action in ["0F3.0", "0F3.1", "0B3.1", "0B3.0"])
    assert backward_order(stretched) == [(0, 3, 1), (0, 3, 0)]
    assert reversed_at_once(stretched) == {(0, 3, 1)}
