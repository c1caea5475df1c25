"""A model whose replicated state does not fit in a control group's memory trains there once its
replicas share parameters.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes.forked_command import ForkedCommand
from support.runs.commands import environment

pytestmark = [pytest.mark.mp, pytest.mark.slow]

MOUNT = Path("/sys/fs/cgroup")
LIMIT = 1100 << 20
"""Replicated state takes 1230 MiB, shared one 640, and four workers have something beside it."""
JOINING = """
import os
from pathlib import Path
from holdfast.launch.cli import main
Path(os.environ["HOLDFAST_TEST_GROUP"]).write_text(str(os.getpid()))
main()
"""
"""The command in a control group: all that it has in memory from then on counts there."""
CONFIG = """
[model]
family = "llama"
layers = 4
hidden = 512
intermediate = 1408
heads = 8
kv_heads = 8
vocab = 1024
[train]
steps = 2
seq_len = 32
global_batch = 4
micro_batch = 1
device = "cpu"
[optimizer]
block_elements = 65536
[parallel]
data = 4
shard = "{shard}"
[checkpoint]
arena_mib = 16
[log]
tensorboard = false
"""


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """The file that takes processes into a control group with this much memory."""
    version_2 = (MOUNT / "cgroup.controllers").exists()
    group = (MOUNT if version_2 else MOUNT / "memory") / f"holdfast-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        names = ("memory.max", "memory.swap.max") if version_2 else ("memory.limit_in_bytes",)
        for name, value in zip(names, (limit, 0), strict=False):
            (group / name).write_text(str(value))
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here ({error}); run it as root")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def train_under(procs: Path, folder: Path, shard: str) -> tuple[int, str]:
    """The exit code of a run in a control group, and what it prints."""
    config, script = folder / f"{shard}.toml", folder / "joining.py"
    config.write_text(CONFIG.format(shard=shard))
    script.write_text(JOINING)
    arguments = ["train", str(config), "--out", str(folder / shard)]
    printed = folder / f"{shard}.txt"
    variables = environment(HOLDFAST_TEST_GROUP=str(procs))
    command = ForkedCommand(arguments, printed, variables, script=script)
    try:
        return command.wait(240), command.printed()
    finally:
        command.kill()


def test_shared_parameters_fit_where_replicated_state_does_not(tmp_path: Path) -> None:
    with limited(LIMIT) as procs:
        replicated, said = train_under(procs, tmp_path, "optimizer")
        shared, trained = train_under(procs, tmp_path, "parameters")
    assert replicated == 2, said
    assert "set parallel.shard = 'parameters'" in said
    assert shared == 0, trained
