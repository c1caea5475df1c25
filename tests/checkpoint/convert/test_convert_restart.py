"""A conversion that is killed goes on.

One that cannot be finished leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoint.convert.work import job
from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError


def save_source(folder: Path, tensors: int = 6, rows: int = 3000) -> dict[str, torch.Tensor]:
    folder.mkdir()
    torch.manual_seed(7)
    values = {f"layers.{i}.weight": torch.randn(rows, 1000) for i in range(tensors)}
    values["norm"] = torch.randn(37).bfloat16()
    save_file(values, folder / "model.safetensors")
    return values


KILLED = """
import os, signal, sys
from pathlib import Path
from holdfast.checkpoint.convert.work import worker
from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.checkpoint.convert.work.journal import ConversionJournal

worker.RECORD_BYTES = 16 << 20
record = ConversionJournal.record
lines = 0

def record_and_die(self, **keys):
    global lines
    record(self, **keys)
    lines += 1
    if lines == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

ConversionJournal.record = record_and_die
convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), "holdfast"))
"""


@pytest.mark.mp
def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    values = save_source(tmp_path / "hf")
    for lines in (2, 1):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "hf"), str(tmp_path / "out"), str(lines)],
            capture_output=True,
            text=True,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "out").exists()
    done = convert(Conversion(tmp_path / "hf", tmp_path / "out", "holdfast"))
    assert done is not None
    assert 40 << 20 < done.resumed_bytes < done.bytes
    assert verify_checkpoint(tmp_path / "out") == []
    [written] = (tmp_path / "out").glob("model-*.safetensors")
    found = load_file(written)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.mp
def test_another_source_starts_over(tmp_path: Path) -> None:
    save_source(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "1"]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert (tmp_path / "out.partial").exists()
    shutil.rmtree(tmp_path / "hf")
    values = save_source(tmp_path / "hf")
    values["norm"] += 1
    save_file(values, tmp_path / "hf/model.safetensors")
    done = convert(Conversion(tmp_path / "hf", tmp_path / "out", "holdfast"))
    assert done is not None
    assert done.resumed_bytes == 0
    [written] = (tmp_path / "out").glob("model-*.safetensors")
    assert torch.equal(load_file(written)["norm"], values["norm"])


@pytest.mark.mp
def test_workers_write_the_same_bytes(tmp_path: Path) -> None:
    save_source(tmp_path / "hf")
    outputs = []
    for workers in (1, 2):
        target = tmp_path / f"out-{workers}"
        command = [sys.executable, "-m", "holdfast.launch.cli", "convert", str(tmp_path / "hf")]
        command += [str(target), "--to", "hf", "--workers", str(workers), "--dtype", "bf16"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "rounded: 6 tensors from F32 to BF16" in done.stdout
        outputs.append((target / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.mp
def test_processes_of_a_launcher_share_the_work(tmp_path: Path) -> None:
    values = save_source(tmp_path / "hf")
    command = [sys.executable, "-m", "holdfast.launch.cli", "convert", str(tmp_path / "hf")]
    command += [str(tmp_path / "out"), "--to", "hf"]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_launcher_is_gone_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    save_source(tmp_path / "hf")
    monkeypatch.setattr(job, "_PATIENCE_S", 0.2)
    with pytest.raises(CheckpointError, match="unset RANK and WORLD_SIZE"):
        convert(Conversion(tmp_path / "hf", tmp_path / "out", "hf"), rank=rank, world=2)


@pytest.mark.mp
def test_a_worker_that_dies_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    save_source(tmp_path / "hf", tensors=16)
    command = [sys.executable, "-m", "holdfast.launch.cli", "convert", str(tmp_path / "hf")]
    command += [str(tmp_path / "out"), "--to", "holdfast", "--workers", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(int(found[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "ended with exit code -9" in errors
    assert not (tmp_path / "out").exists()
    assert convert(Conversion(tmp_path / "hf", tmp_path / "out", "holdfast")) is not None


def test_no_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(tmp_path / "hf")
    monkeypatch.setattr("holdfast.checkpoint.convert.work.job.free_bytes", lambda root: 1 << 20)
    with pytest.raises(CheckpointError, match=r"has \d.* [KM]?i?B free and the output takes"):
        convert(Conversion(tmp_path / "hf", tmp_path / "out", "holdfast"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.mp
def test_a_full_disk_leaves_what_can_be_gone_on_with(tmp_path: Path) -> None:
    save_source(tmp_path / "hf")
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.work.job import convert\n"
        "from holdfast.checkpoint.convert.work.request import Conversion\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30 << 20, 30 << 20))\n"
        "convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), 'holdfast'))\n"
    )
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out")]
    failed = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert "CheckpointError" in failed.stderr
    assert "cannot be written" in failed.stderr
    assert not (tmp_path / "out").exists()
    assert convert(Conversion(tmp_path / "hf", tmp_path / "out", "holdfast")) is not None


@pytest.mark.mp
def test_memory_stays_bounded(tmp_path: Path) -> None:
    values = {"big": torch.ones(150 << 18, 1), "wide": torch.ones(8, 12 << 18)}
    (tmp_path / "hf").mkdir()
    save_file(values, tmp_path / "hf/model.safetensors")
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.formats import holdfast, huggingface\n"
        "from holdfast.checkpoint.convert.work.job import convert\n"
        "from holdfast.checkpoint.convert.work.request import Conversion\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), 'holdfast', memory_bytes=64 << "
        "20))\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < (96 << 20)


@pytest.mark.mp
def test_many_small_files_need_few_open_ones(tmp_path: Path) -> None:
    weights = {f"layers.{number}.weight": torch.full((3,), float(number)) for number in range(150)}
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf/model.safetensors")
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.work.job import convert\n"
        "from holdfast.checkpoint.convert.work.request import Conversion\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))\n"
        f"root = Path({str(tmp_path)!r})\n"
        "convert(Conversion(root / 'hf', root / 'many', 'deepspeed-universal'))\n"
        "convert(Conversion(root / 'many', root / 'again', 'hf'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.mp
def test_most_conversions_do_without_torch(tmp_path: Path) -> None:
    """Importing it takes longer than converting a small model."""
    weights = {"w": torch.randn(3, 4).bfloat16(), "b": torch.randn(3).bfloat16()}
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf/model.safetensors")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.work.job import convert\n"
        "from holdfast.checkpoint.convert.work.request import Conversion\n"
        f"root, last = Path({str(tmp_path)!r}), 'hf'\n"
        "for to in ('holdfast', 'dcp', 'deepspeed-universal', 'hf'):\n"
        "    convert(Conversion(root / last, root / f'as-{to}', to), workers=2)\n"
        "    last = f'as-{to}'\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
    found = load_file(tmp_path / "as-hf/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
