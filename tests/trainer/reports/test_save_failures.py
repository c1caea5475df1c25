"""Failed saves are told once, and again at the end."""

from __future__ import annotations

from holdfast.trainer.reports.checkpoint_events import SaveFailures


def test_a_reason_is_told_once_until_a_save_succeeds_and_all_at_the_end() -> None:
    failures = SaveFailures()
    assert failures.summary() == ""
    assert failures.failed("disk", 5, "1.20 GiB free") == (
        "checkpoint of step 5 failed: 1.20 GiB free"
    )
    failures.succeeded("memory")
    assert failures.failed("disk", 10, "0.70 GiB free") == "", "the same but for its numbers"
    assert failures.failed("disk", 15, "read-only file system")
    failures.succeeded("disk")
    assert failures.failed("disk", 20, "read-only file system")
    assert failures.summary() == (
        "checkpoints of steps 5, 10, 15, 20 failed; the last reason: read-only file system"
    )
