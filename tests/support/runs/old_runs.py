"""Run folders and checkpoints that an earlier version wrote, and what it said of them.

They lie in tests/fixtures/checkpoints/VERSION; its README tells how they were made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.processes.forked_command import ForkedCommand
from support.runs.golden_runs import TESTS

OLD = TESTS / "fixtures" / "checkpoints" / "v0.1"
STOPPED = 4
"""The step after which the runs were stopped."""
RUNS = ("fp32", "bf16", "tied", "half-way")


def expected_of(name: str) -> dict[str, Any]:
    """What the version that wrote a run said of its newest checkpoint.

    `inspect` is the output of that command, `tensors` the SHA-256 of each tensor's bytes by name,
    `hf` the dtype and SHA-256 of each tensor of the Hugging Face folder that it was converted to;
    of "half-way", `changed since step 2` is how many elements of each tensor differ from the
    checkpoint before.
    """
    return json.loads((OLD / "expected.json").read_text())[name]


def damages() -> list[dict[str, Any]]:
    """What can happen to a file of a checkpoint, and the problems that `verify --json` lists
    then.
    """
    return json.loads((OLD / "damages.json").read_text())


def checkpoint_of(name: str) -> Path:
    """The newest checkpoint of a run, in place: it must not be changed."""
    return OLD / name / "checkpoints" / f"step-{STOPPED:08d}"


def copy_of(name: str, folder: Path) -> Path:
    """A copy of a run's folder below `folder`."""
    return Path(shutil.copytree(OLD / name, folder / name))


def do_damage(checkpoint: Path, damage: Mapping[str, Any]) -> None:
    """Change a checkpoint as an entry of damages.json says."""
    path = checkpoint / damage["file"]
    if "xor" in damage:
        content = bytearray(path.read_bytes())
        content[damage["at"]] ^= damage["xor"]
        path.write_bytes(content)
    elif "truncate" in damage:
        os.truncate(path, damage["truncate"])
    elif "remove" in damage:
        path.unlink()
    else:
        assert not path.exists()
        path.write_text(damage["add"])


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `holdfast ARGUMENTS` to its end: exit code, and what it printed. Uses a file in
    `folder`.
    """
    output = folder / "output.txt"
    process = ForkedCommand(arguments, output, {**os.environ, "OMP_NUM_THREADS": "1"})
    return process.wait(60), process.printed()


def json_of(printed: str) -> Any:
    """The JSON object in what a command printed."""
    return json.loads(printed[printed.index("{") : printed.rindex("}") + 1])


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row by row."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
