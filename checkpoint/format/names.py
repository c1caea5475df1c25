"""The names in a folder of checkpoints, and the schemes of URLs. Pure."""

from __future__ import annotations

import re

LATEST = "latest"
"""The file that names the newest checkpoint."""
OWNER = "owner.json"
"""The file that says whose the checkpoints are, where their folder is not a run's own."""
PARTIAL = ".partial"
"""The end of the name of a folder that is not yet, or no longer, a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def scheme_of(place: str) -> str:
    """The scheme of a URL: "s3" of "s3://bucket/run"; empty for a path."""
    scheme, separator, _ = place.partition("://")
    return scheme if separator else ""
