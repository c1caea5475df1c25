"""Torn and foreign lines among a run's records: what reads them goes on, or says so in one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from holdfast.launch.commands.chaos import living_workers
from holdfast.launch.proofs.compare_runs import bits_of, lost_ranks
from holdfast.launch.proofs.replay import read_history
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.elastic.incidents import _written
from holdfast.trainer.reports import last_step
from holdfast.trainer.run import RunDirectory, read_error
from holdfast.trainer.run.history import is_finished, read_events

FOREIGN = ["[]", "3", "{", "\udcff", '{"event": 3}', '{"step": []}', "[" * 9999,
           '{"event": "recovered"}',
           '{"event": "generation", "generation": []}', '{"event": "worker_started", "rank": {}}',
           '{"event": "run_finished"}', '{"event": "rank_lost"}', "NaN", '{"step": 9']  # fmt: skip
METRICS = ['{"step": 1, "loss_hex": "a", "grad_norm_hex": "b"}', '{"step": 2, "loss_hex": "c"}']
EVENTS = [
    {"event": "worker_started", "rank": 0, "pid": os.getpid()},
    {"event": "generation", "generation": 1},
    {"event": "rank_lost", "rank": 1},
    {"event": "recovered", "generation": 2},
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def write(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


@pytest.mark.parametrize("seed", range(50))
def test_readers_find_the_same_among_foreign_lines(run: RunDirectory, seed: int) -> None:
    rng = random.Random(seed)

    def among(lines: list[str]) -> list[str]:
        foreign = [text for text in FOREIGN if "run_f" not in text and "lost" not in text]
        mixed = list(lines)
        for text in rng.sample(foreign, 5):
            mixed.insert(rng.randrange(len(mixed) + 1), text)
        return mixed

    write(run.metrics, among(METRICS))
    write(run.events, among([json.dumps(event) for event in EVENTS]))
    assert bits_of(run.metrics) == {1: ("a", "b"), 2: ("c", "None")}
    assert last_step(run.metrics) == 2
    assert lost_ranks(run) == 1
    assert _written(run) == {1, 2}
    assert not is_finished(run)
    assert [worker.rank for worker in living_workers(run)] in ([], [0])


def test_a_history_of_foreign_events_is_refused_in_one_line(run: RunDirectory) -> None:
    write(run.events, [json.dumps({"event": "generation", "generation": 1})])
    with pytest.raises(ConfigError, match=r"events\.jsonl is not as a run writes it"):
        read_history(run)


@pytest.mark.parametrize("text", [*FOREIGN, '{"kind": "a"}'])
def test_a_reason_that_is_none_counts_as_not_written(run: RunDirectory, text: str) -> None:
    run.error(0).parent.mkdir()
    write(run.error(0), [text])
    assert read_error(run, 0) is None


def test_events_that_are_a_folder_or_a_fifo_are_none(run: RunDirectory) -> None:
    os.mkfifo(run.events)
    assert read_events(run.events) == []
    run.events.unlink()
    run.events.mkdir()
    assert read_events(run.events) == []
