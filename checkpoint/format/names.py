"""The names in a folder of checkpoints, and the paths and URLs of places. Pure."""

from __future__ import annotations

import re
from pathlib import Path

from holdfast.parallel.errors import ConfigError, shown
from holdfast.parallel.reading import is_text

LATEST = "latest"
"""The file that names the newest checkpoint."""
BEST = "best"
"""The file that names the checkpoint with the lowest loss, of a run that keeps the best."""
OWNER = "owner.json"
"""The file that says whose the checkpoints are, where their folder is not a run's own."""
PARTIAL = ".partial"
"""The end of the name of a folder that is not yet, or no longer, a checkpoint."""
VALIDATION = "validation"
"""The key of a manifest's scalars that has the losses of validation sets by name."""
STATE = "state"
"""The key of a manifest's scalars that has the documents of a program's state."""
STATE_VERSION = "state_version"
"""The key of a manifest's scalars that says how the documents are written: 2, or absent."""
_STORES = (
    "abfs|abfss|adl|az|box|dropbox|file|ftp|gcs|gdrive|gs|hdfs|hf|http|https|memory|oci|oss|s3|s3a|"
    "sftp|smb|ssh|webdav|webhdfs"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/].*|file:///.+", re.DOTALL)
_LIKE_A_URL = re.compile(
    rf"[A-Za-z][A-Za-z0-9+.-]*:/.*|:/.*|(?:{_STORES})(?::|//).*", re.DOTALL | re.IGNORECASE
)
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


def place_fault(place: str) -> str:
    """The reason why a place is neither a path nor a URL; empty if it is one.

    A misspelled URL is a path, too, and would be a folder of that name on this machine.
    """
    if _URL.fullmatch(place) or not _LIKE_A_URL.fullmatch(place):
        return ""
    return (
        "neither a path nor a whole URL; write SCHEME://BUCKET/FOLDER, or, for a folder of that "
        "name, its absolute path"
    )


def local_path(place: str | Path, key: str) -> Path:
    """A path of this machine's file systems, with a leading ~ expanded.

    Args:
        key: the option or key that names it, for messages.
    Raises:
        ConfigError: it is a URL, or was meant for one.
    """
    text = str(place)
    if _URL.fullmatch(text) or _LIKE_A_URL.fullmatch(text):
        raise ConfigError(
            f"{key} = {shown(text)}: a URL cannot be used here; name a path of this machine, and "
            "for a folder of that name its absolute path"
        )
    return expanded(place, key)


def expanded(place: str | Path, key: str) -> Path:
    """A path with a leading ~ expanded.

    Args:
        key: the option or key that names it, for messages.
    Raises:
        ConfigError: no home is known for the user, or it is not text.
    """
    if not is_text(str(place)):
        raise ConfigError(f"{key} = {shown(str(place))}: must be UTF-8 text")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key} = {shown(str(place))}: no home is known for ~; name the absolute path, or set "
            "HOME"
        ) from error
