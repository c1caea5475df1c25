"""The secret by which the processes of a run know each other. Local; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.links import MAKE_SECRET, given_secret
from holdfast.trainer.run.identity import first_identity, read_identity, require_private
from holdfast.trainer.run.run_directory import RUNS
from holdfast.trainer.run.run_folder import check_run_folder

_TASKS = RUNS / ".tasks"
"""The folder whose identity the tasks of jobs have in common for which no run's folder is named."""


def job_secret(environment: Mapping[str, str], out: Path | None) -> str:
    """The secret of the tasks of a job, before one of them has opened the run.

    It is `HOLDFAST_SECRET` if that is set; otherwise it is in identity.json, which the first task
    makes, in a folder that all of them see.

    Args:
        out: the run's folder, if it is named.
    Raises:
        ConfigError: `HOLDFAST_SECRET` is too short; the folder is no run's, or cannot be written;
            others may read the file.
    """
    if given := given_secret(environment):
        return given
    folder = _TASKS if out is None else out.expanduser()
    if out is not None:
        check_run_folder(folder)
    try:
        secret = first_identity(folder).secret
    except ConfigError as error:
        raise ConfigError(
            f"{error}; or give the tasks of the job a secret: {MAKE_SECRET}"
        ) from error
    require_private(folder)
    return secret


def run_secret(environment: Mapping[str, str], root: Path) -> str:
    """The secret of a run that has been opened.

    Raises:
        ConfigError: `HOLDFAST_SECRET` is too short, or without it: the folder has no identity.json,
            or others may read it.
    """
    if given := given_secret(environment):
        return given
    require_private(root)
    found = read_identity(root)
    if found is None:
        raise ConfigError(f"{root} has no identity.json; start the run again")
    return found.secret
