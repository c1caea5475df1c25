"""Whatever a file or a message has in it, its reader ends with a value or one clear line.

A traceback, no end within seconds, and memory by a length that nothing has checked are failures.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from support.runs.fuzzed_readers import Reader, file_readers, message_readers
from support.runs.mutations import COUNT, mutated_text
from support.runs.reader_outcomes import bounded, outcome

MESSAGES = message_readers()
FILES = (
    "acceptor",
    "end of run",
    "error of a rank",
    "events",
    "evidence",
    "faults asked for",
    "health",
    "identity",
    "incident",
    "join file",
    "metrics",
)


def check(reader: Reader) -> None:
    """Try a reader on its samples, and on `COUNT` others."""
    for sample in reader.samples:
        assert outcome(reader.read, sample) == "accepted"
    counts = Counter[str]()
    for number in range(COUNT):
        content = mutated_text(reader.samples[number % len(reader.samples)], number)
        with bounded():
            found = outcome(reader.read, content)
        assert found in ("accepted", "refused"), (number, content[:300], found)
        counts[found] += 1
    assert counts["accepted"] > 0, counts


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_any_message_is_understood_or_refused_in_one_line(name: str) -> None:
    check(MESSAGES[name])


@pytest.mark.parametrize("name", FILES)
def test_any_small_file_of_a_run_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    check(file_readers(tmp_path)[name])
