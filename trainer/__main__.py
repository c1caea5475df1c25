"""`python -m holdfast.trainer CONFIG.toml`: a worker of torchrun, srun or mpirun, or alone."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from holdfast.parallel.links import new_secret
from holdfast.parallel.output import (
    begin_process,
    exit_code_of,
    leave,
    outlive_readers,
)
from holdfast.parallel.reading import require_text_names
from holdfast.trainer.external_launcher import run_external_worker
from holdfast.trainer.run import RunRequest, begin_to_hear, job_secret, load_run_config
from holdfast.trainer.worlds import WorldInfo, world_from_environment


def main() -> NoReturn:
    begin_process()
    outlive_readers()
    begin_to_hear()
    leave(exit_code_of(_run))


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m holdfast.trainer", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    require_text_names(sys.argv[1:], os.environ)
    config = load_run_config(arguments.config, arguments.set)
    world = world_from_environment(os.environ)
    if world is not None and world.job:
        world = replace(world, secret=job_secret(os.environ, arguments.out))
    if world is None:
        world = WorldInfo(0, 1, 0, 1, 0, "127.0.0.1", 0, True, secret=new_secret())
    request = RunRequest(arguments.config, config, arguments.out, arguments.resume)
    return run_external_worker(request, world)


if __name__ == "__main__":
    main()
