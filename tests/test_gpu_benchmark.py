"""`make gpu` on a machine without a GPU: it says what it would run, and its code works on a CPU."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes.forked_command import ForkedCommand

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks" / "gpu"
pytestmark = [
    pytest.mark.mp,
    pytest.mark.skipif(not HERE.exists(), reason="the benchmarks lie in the checkout"),
]


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The names of the program's main module."""
    return runpy.run_path(str(HERE / "__main__.py"), run_name="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_would_run(
    program: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program["main"]([]) == 0
    told = capsys.readouterr().out
    assert "sees no CUDA device" in told.splitlines()[0]
    assert [f"  {p.name:<14} {p.what}" for p in program["PIECES"]] == [
        line.partition(" (at most")[0] for line in told.splitlines()[1:]
    ]


def test_make_gpu_runs_it() -> None:
    command = ["make", "-n", "gpu", "GPU_PYTHON=python-of-gpus"]
    # Within another make it would take over that one's options, and tell which folder it enters.
    environment = {name: v for name, v in os.environ.items() if not re.search("MAKE|MFLAGS", name)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert told.splitlines() == [f"python-of-gpus {HERE.relative_to(ROOT)}"]


def test_every_piece_runs_on_a_cpu(tmp_path: Path) -> None:
    out, printed = tmp_path / "gpu.json", tmp_path / "printed.txt"
    arguments = ["--device", "cpu", "--tiny", "--together", "--json", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    program = HERE / "__main__.py"
    done = ForkedCommand(arguments, printed, environment, folder=ROOT, script=program)
    assert done.wait() == 0, done.printed()
    pieces = {piece["name"]: piece for piece in json.loads(out.read_text())["pieces"]}
    assert pieces.pop("tests")["reason"] == "they need a CUDA device"
    assert {piece["status"] for piece in pieces.values()} == {"ran"}
    assert pieces["kernels"]["numbers"]["bits equal the native kernels'"]
    assert pieces["two ranks"]["numbers"]["packed"]["bytes"] < 5000 * 8
    assert pieces["exact"]["numbers"]["last loss"] == pieces["fast"]["numbers"]["last loss"]
    assert [c["step"] for c in pieces["saving"]["numbers"]["checkpoints"]] == [2, 4]
    assert "was aborted" in pieces["one rank"]["numbers"]["abort"]["said"]


def test_a_piece_that_fails_or_takes_too_long_is_one_line(program: dict[str, Any]) -> None:
    wrong = program["Piece"]("wrong", "json", "loads", 1, "")
    report = program["run_here"](wrong, "cpu", True)
    assert (report.status, report.reason.split(":")[0]) == ("failed", "TypeError")
    slow = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(100)"]
    code, text, _ = program["_bounded"](slow, 3)
    assert code is None
    assert text.split("\n")[-1] == "not done after 3 s"


def test_all_pieces_have_a_place_in_nine_minutes(
    program: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all = program["run_all"]
    monkeypatch.setitem(run_all.__globals__, "WHOLE_S", 1.0)
    reports = run_all(program["PIECES"], "cpu", True, together=True)
    assert {(report.status, report.reason) for report in reports} == {("skipped", "1 s were over")}


def test_what_torch_brings_is_not_carried(program: dict[str, Any]) -> None:
    names = {line.partition("==")[0] for line in program["installation"].wanted()}
    assert {"msgspec", "torchft", "typer", "pytest", "transformers"} <= names
    assert not names & {"torch", "numpy", "sympy", "grpcio", "deepspeed", "megatron-core"}
