"""The bits of training are those that are written down in tests/fixtures/golden/bits.json.

tests/trainer/test_same_bits.py shows that all layouts give the bits of one process; this shows that
one process, each precision and each tensor-parallel size give what they gave when the record was
made.
"""

from __future__ import annotations

from functools import cache

import pytest

from support.processes.cluster import Cluster
from support.runs.golden_runs import (
    NAMES,
    RECORD_COMMAND,
    GoldenRun,
    assert_near,
    config_of,
    read_records,
    run_golden,
    runs_of_kind,
    this_kind,
)

pytestmark = [pytest.mark.mp]


@pytest.fixture(scope="module")
def golden(cluster: Cluster) -> object:
    """Runs one by its name, each once."""
    return cache(lambda name: run_golden(cluster, name))


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_the_recorded_ones(golden: object, name: str) -> None:
    recorded = runs_of_kind(read_records(), this_kind())
    if recorded is None:
        pytest.skip(f"no record of {this_kind()}: on a good version run `{RECORD_COMMAND}`")
    assert golden(name) == recorded[name]  # pyrefly: ignore[not-callable]


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_near_those_recorded_on_every_kind_of_processor(
    golden: object, name: str
) -> None:
    run: GoldenRun = golden(name)  # pyrefly: ignore[not-callable]
    for record in read_records():
        assert_near(run, record.runs[name], config_of(name).train.precision)


def test_every_record_has_every_run_whole() -> None:
    """A record that lacks a run, or a part of its steps, would let a change pass."""
    records = read_records()
    assert len({record.kind for record in records}) == len(records) >= 2
    for record in records:
        assert set(record.runs) == set(NAMES)
        for name, run in record.runs.items():
            assert len(run.losses) == len(run.norms) == config_of(name).train.steps
            assert len(run.digest) == 64
    assert len({run.digest for record in records for run in record.runs.values()}) > len(NAMES)
