"""Everything that needs a GPU, in less than nine minutes: tests and benchmarks.

    make gpu                                    # or: python benchmarks/gpu
    python benchmarks/gpu --device cpu --tiny   # the same code, with sizes that say nothing

Each piece runs in a process of its own within its time, and reports that it ran, was skipped, or
failed. Results: a table, and benchmarks/results/gpu.json. Without a GPU it says what it would run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import installation
from reports import Report, SkippedPiece

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "gpu.json"
WHOLE_S = 530.0
"""Within this everything ends."""
INSTALL_S = 120.0
STARTS_S = 5.0
"""What is left at least when a piece begins."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing to run."""

    name: str
    module: str
    function: str
    most_s: float
    what: str
    takes_folder: bool = False


PIECES = (
    Piece("kernels", "kernels", "run", 60, "exact mode's kernels against the memory's bandwidth"),
    Piece("tests", "", "", 130, "the tests marked gpu"),
    Piece("exact", "training", "exact", 100, "1.3 billion parameters, bf16, exact mode"),
    Piece("fast", "training", "fast", 80, "the same in fast mode"),
    Piece("plain", "training", "plain", 60, "the same in a plain PyTorch loop"),
    Piece("one rank", "exchange", "one_rank", 60, "NCCL: creation, time-out, abort"),
    Piece("two ranks", "exchange", "two_ranks", 40, "sums of two ranks of one device", True),
    Piece("saving", "saving", "run", 90, "what checkpoints cost a run", True),
    Piece("transformers", "training", "transformers", 60, "the same model by transformers"),
    Piece("offload", "training", "offload", 120, "activations in host memory and on a drive", True),
)
"""In order of importance: what comes last is skipped first when time is short."""


def obstacle() -> str:
    """Why no piece can run on a GPU here; empty if they can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def run_here(piece: Piece, device: str, tiny: bool) -> Report:
    """Run a piece in this process."""
    begin = time.perf_counter()
    try:
        function: Any = getattr(importlib.import_module(piece.module), piece.function)
        with tempfile.TemporaryDirectory() as folder:
            more = (Path(folder),) if piece.takes_folder else ()
            numbers = function(device, tiny, *more)
    except SkippedPiece as reason:
        return Report(piece.name, "skipped", str(reason))
    except Exception as error:
        told = f"{type(error).__name__}: {installation.last_line(str(error))}"
        return Report(piece.name, "failed", told, wall_s=time.perf_counter() - begin)
    return Report(piece.name, "ran", "", numbers, time.perf_counter() - begin)


def run_tests(most_s: float, device: str) -> Report:
    """Run the tests marked gpu in a process of their own."""
    if device != "cuda":
        return Report("tests", "skipped", "they need a CUDA device")
    # Other files import what is not carried.
    places = sorted((installation.ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in places if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout", "100", *files]
    code, text, wall_s = _bounded(command, most_s)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", text)}
    if code == 0:
        return Report("tests", "ran", "", counts, wall_s)
    return Report("tests", "failed", installation.last_line(text), counts, wall_s)


def _bounded(command: Sequence[str], most_s: float) -> tuple[int | None, str, float]:
    """Run a command with all that it starts for a time. Returns its exit code, None if it was
    ended.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=installation.ROOT,
        env=installation.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=most_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        code, text = None, f"{text}\nnot done after {most_s:.0f} s"
    return code, text, time.perf_counter() - begin


def run_apart(piece: Piece, device: str, tiny: bool, most_s: float) -> Report:
    """Run a piece in a process of its own, which is ended when its time is over."""
    if not piece.module:
        return run_tests(most_s, device)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, str(HERE), "--piece", piece.name, "--device", device]
        command += ["--json", str(out), *(["--tiny"] if tiny else [])]
        _, text, wall_s = _bounded(command, most_s)
        if not out.exists():
            return Report(piece.name, "failed", installation.last_line(text), wall_s=wall_s)
        (report,) = json.loads(out.read_text())["pieces"]
    return Report(**report | {"wall_s": wall_s})


def run_all(pieces: Sequence[Piece], device: str, tiny: bool, together: bool) -> list[Report]:
    """Run pieces in turn, as long as there is time."""
    end = time.perf_counter() + WHOLE_S
    reason = "" if together else installation.prepare(INSTALL_S)
    reports = []
    for piece in pieces:
        left = end - time.perf_counter()
        if reason:
            report = Report(piece.name, "skipped", f"holdfast does not import: {reason}")
        elif left < STARTS_S:
            report = Report(piece.name, "skipped", f"{WHOLE_S:.0f} s were over")
        elif together and piece.module:
            report = run_here(piece, device, tiny)
        else:
            report = run_apart(piece, device, tiny, min(piece.most_s, left))
        print(f"{piece.name}: {report.status} {report.reason}".rstrip(), flush=True)
        reports.append(report)
    return reports


def table(reports: Sequence[Report]) -> str:
    """One line for each piece and for each of its numbers."""
    lines = []
    for report in reports:
        lines.append(
            f"{report.name:<14} {report.status:<8} {report.wall_s:6.1f} s  {report.reason}"
        )
        lines += [f"  {key:<34} {_short(value)}" for key, value in report.numbers.items()]
    return "\n".join(line.rstrip() for line in lines)


def _short(value: Any) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
        case list():
            return "; ".join(_short(inner) for inner in value)
        case _:
            return str(value)


def _machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing")
    parser.add_argument("--only", default="", help="pieces, by commas")
    parser.add_argument("--together", action="store_true", help="all in this process")
    parser.add_argument("--piece", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", default=str(RESULTS))
    args = parser.parse_args(arguments)
    wanted = [piece for piece in PIECES if piece.name in (args.only or piece.name).split(",")]
    if args.device == "cuda" and (reason := obstacle()):
        print(f"Nothing runs: {reason}. On a machine with a GPU this would run:")
        for piece in wanted:
            print(f"  {piece.name:<14} {piece.what} (at most {piece.most_s:.0f} s)")
        return 0
    if args.piece:
        (piece,) = [piece for piece in PIECES if piece.name == args.piece]
        reports = [run_here(piece, args.device, args.tiny)]
    else:
        reports = run_all(wanted, args.device, args.tiny, args.together)
        print(table(reports))
    record = {"machine": _machine(args.device), "pieces": [asdict(report) for report in reports]}
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(record, indent=2) + "\n")
    return int(any(report.status == "failed" for report in reports))


if __name__ == "__main__":
    sys.exit(main())
