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
_UNFINISHED = re.compile(r"step-\d{8,}(\.(g(\d+)-)?[\w-]+)?\.partial")


def name_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def attempt_of(generation: int, number: int | str, identity: str) -> str:
    """The name of one attempt to save: no other attempt has it, of whatever process.

    Args:
        generation: the generation of the ranks that save; 0 outside of elastic runs.
        number: the number of the save among those of this generation.
        identity: the random name of the save.
    """
    return f"g{generation}-s{number}-{identity[:12]}"


def unfinished_generation(name: str) -> int | None:
    """The generation that left a folder that is no checkpoint; -1: unknown.

    None for the name of anything else.
    """
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else int(found[3] or -1)


def scheme_of(place: str) -> str:
    """The scheme of a URL: "s3" of "s3://bucket/run"; empty for a path."""
    scheme, separator, _ = place.partition("://")
    return scheme if separator else ""
