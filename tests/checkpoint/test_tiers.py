"""Tiers: an S3 server that dies in the middle, and memory that outlives a worker."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.checkpoint import save
from holdfast.checkpoint.format.names import step_of
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import newest, readable
from holdfast.checkpoint.stores.remote import FsspecStore
from holdfast.checkpoint.tiers.flush import flush
from holdfast.checkpoint.tiers.uploader import share_of, upload_file
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.config.loading import dump_toml
from holdfast.trainer.run.resume import memory_root
from support.processes.forked_command import ForkedCommand
from support.runs.elastic_runs import pace
from support.runs.small_runs import events_of, make_config, metrics_of

KEY, SECRET = "test-key", "test-secret"


def _lasting_port() -> int:
    """A free port below those that systems give to connections: a dead server keeps it."""
    for port in random.SystemRandom().sample(range(15_000, 30_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class S3Server:
    """A real S3 server with its objects in a folder, so that it can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.port = _lasting_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # What a killed server had half received is no object; it hides these files itself.
        for half in self._folder.rglob(".rclone_temp_*"):
            half.unlink()
        rclone = Path(sys.executable).with_name("rclone")
        command = [
            str(rclone), "serve", "s3", str(self._folder), "--addr", f"127.0.0.1:{self.port}",
            "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull, "--vfs-cache-mode", "off",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            # This server answers a range with the checksum of the whole object.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "OMP_NUM_THREADS": "1",
        }


def wait_for(condition: Callable[[], bool], timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    running = S3Server(tmp_path / "s3")
    running.start()
    yield running
    running.kill()


def _train(config: Any, root: Path, environment: dict[str, str], folder: Path) -> ForkedCommand:
    path = folder / f"{root.name}.toml"
    path.write_text(dump_toml(config))
    output = folder / f"{root.name}.txt"
    return ForkedCommand(["train", str(path), "--out", str(root)], output, environment)


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
def test_an_s3_server_that_dies_in_the_middle_loses_nothing(
    server: S3Server, tmp_path: Path
) -> None:
    model, train = {"layers": 3}, {"steps": 12, "global_batch": 4}
    plain = make_config(model=model, train=train)
    base = _train(plain, tmp_path / "plain", server.environment, tmp_path)
    checkpoint = {"every": 3, "path": "s3://bucket/run"}
    config = make_config(
        model=model,
        train={**train, "stop_after": 9},
        parallel={"data": 2},
        checkpoint=checkpoint,
    )
    root = tmp_path / "first"
    first = _train(config, root, server.environment, tmp_path)
    uploaded = tmp_path / "s3" / "bucket" / "run"
    # The first is the owner's name, while the run still looks for what is there.
    wait_for(lambda: uploaded.exists() and any(uploaded.glob("step-*")))
    server.kill()
    # The run computes its steps without it.
    wait_for(lambda: (root / "metrics.jsonl").read_text().count("\n") == 9)
    server.start()
    assert first.wait(timeout=150) == 0, first.printed()
    assert base.wait(timeout=150) == 0
    events = events_of(root, "checkpoint_committed")
    remote = [event["step"] for event in events if event["tier"] == "remote"]
    assert remote == [3, 6, 9]
    assert not events_of(root, "checkpoint_failed")
    for step in remote:
        assert verify_checkpoint(uploaded / f"step-{step:08d}") == []
    looked = ["verify", "s3://bucket/run"]
    verified = ForkedCommand(looked, tmp_path / "verify.txt", server.environment)
    assert verified.wait(timeout=150) == 0, verified.printed()
    assert "s3://bucket/run/step-00000009: all " in verified.printed()
    # Another machine in another layout, which has nothing but the URL.
    shutil.rmtree(root / "checkpoints")
    second = make_config(model=model, train=train, parallel={"pipeline": 3}, checkpoint=checkpoint)
    again = _train(second, tmp_path / "second", server.environment, tmp_path)
    assert again.wait(timeout=150) == 0, again.printed()
    lines, whole = metrics_of(tmp_path / "second"), metrics_of(tmp_path / "plain")
    assert [line["step"] for line in lines] == list(range(10, 13))
    assert [line["loss_hex"] for line in lines] == [line["loss_hex"] for line in whole[9:]]
    [one], [two] = (events_of(tmp_path / name, "run_finished") for name in ("plain", "second"))
    assert one["parameter_digest"] == two["parameter_digest"]


@pytest.mark.mp
@pytest.mark.chaos
def test_uploads_under_way_when_a_rank_is_lost_are_made_good(
    server: S3Server, tmp_path: Path
) -> None:
    config = make_config(
        model={"layers": 2},
        train={"steps": 30, "global_batch": 4},
        parallel={"data": 2},
        checkpoint={"every": 10, "path": "s3://bucket/run"},
        elastic=pace({"enabled": True, "local_nodes": 2}, 0.2),
    )
    root = tmp_path / "run"
    run = _train(config, root, server.environment, tmp_path)
    wait_for(lambda: (root / "metrics.jsonl").exists())
    server.kill()
    local = root / "checkpoints"
    wait_for(lambda: bool(LocalStore(local).paths()))
    workers = {event["rank"]: event["pid"] for event in events_of(root, "worker_started")}
    os.kill(workers[1], signal.SIGKILL)
    wait_for(lambda: bool(events_of(root, "recovered")))
    server.start()
    assert run.wait(timeout=150) == 0, run.printed()
    events = events_of(root, "checkpoint_committed")
    steps = {tier: [e["step"] for e in events if e["tier"] == tier] for tier in ("disk", "remote")}
    assert steps["remote"] == [10, 20, 30]
    # The first was on the disk when the rank was lost: it is not saved again.
    assert steps["disk"] == [10, 20, 30]
    assert not events_of(root, "checkpoint_failed")
    for step in (10, 20, 30):
        assert verify_checkpoint(tmp_path / f"s3/bucket/run/step-{step:08d}") == []


@pytest.mark.chaos
def test_an_upload_in_parts_survives_the_server(server: S3Server, tmp_path: Path) -> None:
    """A file of many parts, the server killed between them, is there in the end, byte for byte."""
    import threading

    from holdfast.checkpoint.saving.arena import Deadline

    content = os.urandom(1 << 20) * 96
    path = tmp_path / "large"
    path.write_bytes(content)
    options = {
        "key": KEY,
        "secret": SECRET,
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{server.port}"},
    }
    store = FsspecStore("s3://bucket/run", options)
    calls: list[int] = []
    put = store._filesystem.put_file

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return put(*arguments, **keywords)

    store._filesystem.put_file = counted

    def disturb() -> None:
        wait_for(lambda: bool(calls))
        time.sleep(0.1)
        server.kill()
        time.sleep(0.5)
        server.start()

    thread = threading.Thread(target=disturb)
    thread.start()
    upload_file(store, path, "step-00000001", "large", Deadline(90))
    thread.join()
    assert len(calls) > 1, "the kill came too late to disturb anything"
    assert (tmp_path / "s3/bucket/run/step-00000001/large").read_bytes() == content


def test_a_folder_url_is_a_tier_with_its_own_retention(tmp_path: Path) -> None:
    """fsspec's own local driver: the same code without a server."""
    import torch

    store = FsspecStore(f"file://{tmp_path}/remote")
    assert store.names() == []
    from holdfast.checkpoint.saving.arena import Deadline

    for step in (1, 2, 3):
        path = save(tmp_path / "local", {"a": torch.full((9,), float(step))}, step=step)
        manifest = LocalStore(path.parent).manifest(path.name)
        for name in (*manifest.files, "manifest.json"):
            store.put(path / name, path.name, name)
    assert store.names() == ["step-00000001", "step-00000002", "step-00000003"]
    assert store.retain(2) == ["step-00000001"]
    assert [manifest.step for _, manifest in readable(store)] == [3, 2]
    with pytest.raises(CheckpointError, match="could not be uploaded"):
        upload_file(store, tmp_path / "none", "step-00000009", "x", Deadline(0.0))


def test_a_url_that_no_driver_knows_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.path = 'tape://x' cannot be used"):
        FsspecStore("tape://x")


def test_every_file_is_uploaded_by_one_rank_and_bytes_are_even() -> None:
    sizes = {f"f{i}": 100 + i for i in range(11)} | {"manifest-like": 1}
    shares = [share_of(sizes, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.slow
def test_memory_outlives_a_killed_worker_and_goes_to_the_disk(tmp_path: Path) -> None:
    """The newest copy in memory becomes a checkpoint when a worker dies; the run goes on there."""
    sections: dict[str, Any] = {"parallel": {"data": 2}, "train": {"steps": 100_000}}
    config = make_config(**sections, checkpoint={"memory_every": 2})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = tmp_path / "run"
    process = _train(config, root, environment, tmp_path)
    wait_for(lambda: memory_root(root) is not None)
    memory = memory_root(root)
    assert memory is not None
    wait_for(
        lambda: len(LocalStore(memory).paths()) == 1 and newest(LocalStore(memory)) is not None
    )
    wait_for(lambda: len(metrics_of(root)) > 5)
    victim = events_of(root, "worker_started")[1]["pid"]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=150) == 3, process.printed()
    assert "rank 1 was killed by SIGKILL" in process.printed()
    assert "kept the copy in memory as" in process.printed()
    assert not memory.exists(), "memory is given back"
    [kept] = LocalStore(root / "checkpoints").paths()
    step = step_of(kept.name) or 0
    assert step % 2 == 0
    assert verify_checkpoint(kept) == []
    done = len(metrics_of(root))
    assert done - step <= 4, "no more than what was computed since the last copy is lost"
    after = make_config(parallel={"data": 2}, train={"steps": 100_000, "stop_after": step + 3})
    again = _train(after, root, environment, tmp_path)
    assert again.wait(timeout=150) == 0, again.printed()
    [resumed] = events_of(root, "resumed")
    assert resumed["step"] == step


def test_a_copy_goes_to_the_disk_only_when_it_is_newer_and_whole(tmp_path: Path) -> None:
    import torch

    memory, disk = tmp_path / "memory", tmp_path / "disk"
    assert flush(memory, disk) is None
    save(memory, {"a": torch.ones(50)}, step=4)
    assert flush(memory, disk) == disk / "step-00000004"
    assert verify_checkpoint(disk / "step-00000004") == []
    assert flush(memory, disk) is None
    path = save(memory, {"a": torch.ones(50)}, step=5)
    [file] = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(CheckpointError, match="is damaged"):
        flush(memory, disk)
    assert [found.name for found in LocalStore(disk).paths()] == ["step-00000004"]


def test_configuration_names_the_tiers() -> None:
    remote = make_config(checkpoint={"path": "s3://bucket/run"})
    local = make_config(checkpoint={"path": "/data/checkpoints"})
    assert remote.checkpoint.url == "s3://bucket/run"
    assert local.checkpoint.url == ""
    assert json.loads(msgspec.json.encode(local))["checkpoint"]["path"] == "/data/checkpoints"
