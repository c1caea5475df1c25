"""A worker's log says with every line which rank wrote it, in which generation and step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.trainer.run import RunDirectory, locate_log, log_to_file


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("holdfast")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


def test_every_line_of_a_log_says_rank_generation_and_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log_to_file(run, 3)
    logger = logging.getLogger("holdfast.loop")
    logger.info("before training")
    at = [2, 7]
    locate_log(lambda: (at[0], at[1]))
    logger.warning("within")
    at[1] = 8
    logger.info("later")
    lines = [line.split(" ", 2)[2] for line in run.log(3).read_text().splitlines()]
    assert lines == [
        "rank 3 generation 0 step 0 INFO holdfast.loop: before training",
        "rank 3 generation 2 step 7 WARNING holdfast.loop: within",
        "rank 3 generation 2 step 8 INFO holdfast.loop: later",
    ]


def test_a_process_without_a_log_file_has_no_place_to_tell() -> None:
    logging.getLogger("holdfast").handlers[:] = []
    locate_log(lambda: (1, 1))
