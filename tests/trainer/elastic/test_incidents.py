"""What is written of changes is looked up in the newest start of a run."""

from __future__ import annotations

import json
from pathlib import Path

from holdfast.elastic.history import newest_start
from holdfast.trainer.elastic.incidents import _written
from holdfast.trainer.run import RunDirectory


def test_changes_of_an_earlier_start_do_not_count_as_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert _written(run) == set()
    earlier = [{"event": "generation", "generation": number} for number in (1, 2, 3)]
    newest = [
        {"event": "generation", "generation": 1},
        {"event": "rank_joined", "generation": 9},
        {"event": "recovered", "generation": 2},
    ]
    lines = [json.dumps(event) for event in (*earlier, *newest)]
    lines.insert(5, '{"event": "gener')  # torn by a full disk
    run.events.write_text("".join(f"{line}\n" for line in lines))
    assert _written(run) == {1, 2}
    assert newest_start([*earlier, *newest]) == 3
    assert newest_start([{"event": "worker_started", "rank": 0}]) is None
