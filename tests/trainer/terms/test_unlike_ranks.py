"""Workers that a launcher has started with different files, settings and machines."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from support.runs.commands import CONFIG, HOLDFAST, environment

pytestmark = pytest.mark.mp
TEXT = '[data]\nkind = "text"\npath = ["mine.txt"]\n'


def test_ranks_that_differ_are_told_every_difference_before_anything_is_made(
    tmp_path: Path,
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.replace("pipeline = 2", "") + TEXT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = {0: {}, 1: {"ATEN_CPU_CAPABILITY": "default"}}
    arguments = {0: (), 1: ("--set", "numerics.fraction_bits=40", "--set", "log.every=3")}
    started = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "mine.txt").write_text(f"the text of {rank}. " * 500)
        started.append(
            subprocess.Popen(
                [*HOLDFAST, "train", str(config), *arguments[rank]],
                cwd=folder,
                env=environment(**world, **own[rank], RANK=str(rank)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    told = [process.communicate(timeout=90)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], told
    assert told[0] == told[1]
    bits, data, certificate = told[0].splitlines()
    assert bits.startswith("holdfast: numerics.fraction_bits: 44 on rank 0, 40 on rank 1; start")
    assert data.startswith("data: fingerprint ")
    assert f"(mine.txt, in {tmp_path / '1'}) on rank 1; they would read other tokens" in data
    assert certificate.startswith("certificate: ")
    assert all(kind in certificate for kind in ("functions", "backward pass", "update"))
    assert not (tmp_path / "0/runs").exists()
