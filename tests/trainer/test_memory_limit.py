"""A model whose replicated state does not fit in a control group's memory trains there once its
replicas share parameters.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.runs.commands import HOLDFAST, environment

pytestmark = [pytest.mark.mp, pytest.mark.slow]

MOUNT = Path("/sys/fs/cgroup")
LIMIT = 2600 << 20
"""Four workers with torch take 0.9 GiB of it before they have a model."""
CONFIG = """
[model]
family = "llama"
layers = 12
hidden = 512
intermediate = 1408
heads = 8
kv_heads = 8
vocab = 4096
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


def train_under(procs: Path, folder: Path, shard: str) -> subprocess.CompletedProcess[str]:
    config = folder / f"{shard}.toml"
    config.write_text(CONFIG.format(shard=shard))
    return subprocess.run(
        [*HOLDFAST, "train", str(config), "--out", str(folder / shard)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: procs.write_text(str(os.getpid())),
    )


def test_shared_parameters_fit_where_replicated_state_does_not(tmp_path: Path) -> None:
    with limited(LIMIT) as procs:
        replicated = train_under(procs, tmp_path, "optimizer")
        shared = train_under(procs, tmp_path, "parameters")
    assert replicated.returncode == 2, replicated.stderr
    assert "set parallel.shard = 'parameters'" in replicated.stderr
    assert shared.returncode == 0, shared.stderr
