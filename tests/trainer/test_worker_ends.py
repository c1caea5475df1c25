"""How a worker's end is written down: one envelope around both kinds of worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.parallel.errors import ConfigError, PeerLost, Stopped
from holdfast.trainer import elastic, worker
from holdfast.trainer.run import RunDirectory, read_error, write_error
from holdfast.trainer.worlds.world import local_world
from support.processes.fake_clock import FakeClock
from support.runs.small_runs import make_config

ENDS = [
    (None, 0),
    (KeyboardInterrupt(), 130),
    (Stopped("told to stop"), Stopped.exit_code),
    (ConfigError("a wrong key"), ConfigError.exit_code),
    (ValueError("a fault of ours"), 1),
]
Start = Callable[[RunDirectory, BaseException | None], int]


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The log of this process is put back: a worker sends it to its file."""
    logger = logging.getLogger("holdfast")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def raising(error: BaseException | None) -> Callable[..., None]:
    def call(*_: Any) -> None:
        if error is not None:
            raise error

    return call


def plain(run: RunDirectory, error: BaseException | None, *, announce: bool = False) -> int:
    store: Any = object()
    world = local_world(0, 1)
    return worker.run_worker(
        make_config(), world, run, announce=announce, store=store, task=raising(error)
    )


@pytest.mark.parametrize("kind", ["plain", "elastic"])
@pytest.mark.parametrize(("error", "code"), ENDS)
def test_both_kinds_of_worker_write_down_their_end_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    error: BaseException | None,
    code: int,
) -> None:
    run = RunDirectory(tmp_path)
    if kind == "plain":
        assert plain(run, error) == code
    else:
        monkeypatch.setattr(elastic, "train_elastic_worker", raising(error))
        monkeypatch.setattr(worker, "stacks_on_signal", lambda _: None)  # of this process
        files = {name: tmp_path / name for name in ("stacks", "failure", "flight_record")}
        spec: Any = SimpleNamespace(rank=0, incarnation=0, identity="0", node="here", **files)
        run.error(0).parent.mkdir()
        write_error(run, 0, ValueError("of the worker that this one replaces"))
        assert worker.run_elastic_worker(make_config(), spec, None, run) == code  # type: ignore[arg-type]
    left = read_error(run, 0)
    if error is None or isinstance(error, KeyboardInterrupt):
        assert left is None
    else:
        assert left is not None
        assert (left.exit_code, str(error) in left.message) == (code, True)
    kept = [*run.incidents.glob("evidence-*-rank-0-failed.json"), *tmp_path.glob("failure")]
    assert len(kept) == (type(error) is ValueError)
    traceback = "Traceback" in run.log(0).read_text()
    assert traceback == isinstance(error, ConfigError | ValueError)
    assert capfd.readouterr().err == ""


def test_a_worker_that_is_to_announce_its_end_prints_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert plain(RunDirectory(tmp_path), ConfigError("a wrong key"), announce=True) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("holdfast: rank 0: a wrong key (log: ")


def test_a_worker_that_only_lost_a_peer_stays_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.log(1).parent.mkdir(parents=True)
    write_error(run, 1, ValueError("the cause"))
    store: Any = object()
    code = worker.run_worker(
        make_config(parallel={"data": 2}),
        local_world(0, 2),
        run,
        announce=True,
        store=store,
        task=raising(PeerLost("rank 1 is gone")),
    )
    assert code == PeerLost.exit_code
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("told_after_s", [0.0, 1.0, None])
def test_a_rank_that_lost_a_peer_waits_a_while_for_the_reason_that_another_tells(
    tmp_path: Path, told_after_s: float | None
) -> None:
    run, clock = RunDirectory(tmp_path), FakeClock()
    begin = clock()
    run.error(1).parent.mkdir(parents=True)
    write_error(run, 1, PeerLost("rank 0 is gone"))

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if told_after_s is not None and clock() >= begin + told_after_s:
            write_error(run, 0, ValueError("the reason"))

    told = worker.another_rank_tells(run, local_world(1, 2), clock=clock, sleep=sleep)
    assert told is (told_after_s is not None)
    waited_s = worker.PEER_REASON_S if told_after_s is None else told_after_s
    assert clock() - begin == pytest.approx(waited_s, abs=0.1)


class Present:
    """A rendezvous store where other ranks say that they are there as time goes by."""

    def __init__(self, clock: FakeClock, come_s: dict[int, float]) -> None:
        self._clock, self._come_s = clock, come_s

    def set(self, key: str, value: str) -> None:
        assert (key, value) == ("here/0", "")

    def check(self, keys: list[str]) -> bool:
        return all(self._come_s.get(int(key[5:]), 1e9) <= self._clock() for key in keys)


@pytest.mark.parametrize("come_s", [{1: 0.0, 2: 0.0}, {1: 1.0, 2: 200.0}])
def test_a_start_waits_for_all_workers_and_names_those_that_it_waits_for(
    come_s: dict[int, float],
) -> None:
    clock, told = FakeClock(), list[str]()
    begin_s = clock.now_s
    store: Any = Present(clock, {rank: begin_s + s for rank, s in come_s.items()})
    worker.meet(store, local_world(0, 3), tell=told.append, clock=clock, sleep=clock.sleep)
    if come_s[2]:
        (line,) = told
        assert "1 have not come: rank 2" in line
    else:
        assert not told


def test_workers_that_never_come_end_the_start_and_left_over_variables_are_thought_of() -> None:
    clock = FakeClock()
    store: Any = Present(clock, {})
    with pytest.raises(PeerLost, match=r"2 have not come: rank 1, 2; .*unset RANK and WORLD_SIZE"):
        worker.meet(store, local_world(0, 3), tell=lambda _: None, clock=clock, sleep=clock.sleep)
    assert clock.now_s >= worker.STORE_TIMEOUT_S
