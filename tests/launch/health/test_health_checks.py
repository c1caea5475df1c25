"""What is looked at on a node: on real memory, cores and folders of this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from holdfast.launch.health.clocks import check_clocks
from holdfast.launch.health.disks import check_disk
from holdfast.launch.health.links import LinkClient, LinkServer
from holdfast.launch.health.memory import PATTERNS, check_memory, first_fault, write_pattern
from holdfast.launch.health.node import CHECKPOINTS, OFFLOAD, checkpoint_bytes, folders_of
from holdfast.launch.health.products import bits_check, check_cores, check_device
from holdfast.launch.health.report import HealthReport, JobReport, rows_of
from holdfast.launch.machine_errors.gpus import gpu_states
from holdfast.trainer.plan_report import plan_report
from support.runs.machine_trees import MachineTree
from support.runs.small_runs import make_config

CPU = torch.device("cpu")
WORDS = (1 << 20) + 77
"""More than are written at a time."""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bit_that_flips_is_found_with_its_place(pattern: str) -> None:
    words = torch.empty(WORDS, dtype=torch.int64)
    write_pattern(words, pattern)
    assert first_fault(words, pattern) == ""
    words[WORDS - 3] ^= 1 << 40
    found = first_fault(words, pattern)
    assert found.startswith(f"{pattern}: byte {8 * (WORDS - 3):,} of the tested memory ")
    assert "bits 40 of its word flipped" in found


def test_each_bit_of_memory_is_written_in_both_polarities() -> None:
    words = torch.empty(64, dtype=torch.int64)
    seen = {bit: set[int]() for bit in range(64)}
    for pattern in PATTERNS:
        write_pattern(words, pattern)
        for bit in seen:
            seen[bit].add(int(words[5]) >> bit & 1)
    assert all(values == {0, 1} for values in seen.values())
    write_pattern(words, "walking ones")
    assert {int(word).bit_count() for word in words} == {1}
    assert len({int(word) for word in words}) == 64


def test_memory_that_keeps_its_patterns_passes() -> None:
    check = check_memory(CPU, 1 << 22)
    assert check.passed
    assert check.value == 4.0


def test_equal_products_have_equal_bits_on_each_core() -> None:
    rate, bits = check_cores()
    assert rate.passed
    assert isinstance(rate.value, float)
    assert rate.value > 0
    assert bits.passed
    assert bits.value == check_cores([min(os.sched_getaffinity(0))])[1].value


def test_a_core_with_other_bits_is_named() -> None:
    digests = {"core 0": ["a"] * 3, "core 1": ["a", "b", "a"], "core 2": ["a"] * 3}
    check = bits_check("bits", digests)
    assert not check.passed
    assert check.reason == "equal products have other bits: 1 of 3 on core 1"


def test_a_disk_is_written_and_read_and_nothing_is_left(tmp_path: Path) -> None:
    room, written, read = check_disk("run", tmp_path / "not" / "yet", 8 << 20)
    assert [room.passed, written.passed, read.passed] == [True] * 3
    assert room.unit == "GiB"
    assert min(float(written.value), float(read.value)) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_the_room_that_a_run_needs_fails(tmp_path: Path) -> None:
    (room,) = check_disk("checkpoints", tmp_path, 4 << 20, needed_bytes=1 << 60)
    assert not room.passed
    assert "free, and 1,048,576.0 TiB needed" in room.reason


def test_a_folder_that_cannot_be_written_fails() -> None:
    (room,) = check_disk("run", Path("/proc/self"), 4 << 20)
    assert not room.passed
    assert room.reason.startswith("/proc/self: ")


def test_the_folders_of_a_run_are_those_that_it_writes_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    plain = folders_of(make_config(), run, run / "checkpoints")
    assert plain[CHECKPOINTS] == run / "checkpoints"
    assert OFFLOAD not in plain
    away = make_config(offload={"activations": "ssd", "path": "/mnt/drive"})
    assert folders_of(away, run, run / "checkpoints")[OFFLOAD] == Path("/mnt/drive")


def test_the_room_for_checkpoints_is_that_of_one_as_the_plan_tells() -> None:
    config = make_config()
    assert checkpoint_bytes(config) == plan_report(config).checkpoint_bytes


@pytest.mark.mp
def test_clocks_of_cores_are_read_where_the_kernel_tells_them(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path)
    for core, now in enumerate((1_000_000, 2_000_000, 3_000_000)):
        folder = f"devices/system/cpu/cpu{core}/cpufreq"
        tree.count(f"{folder}/scaling_cur_freq", now)
        tree.count(f"{folder}/cpuinfo_max_freq", 4_000_000)
    (clock, *_) = check_clocks(tree.roots)
    assert (clock.name, clock.value, clock.comparison) == ("clock of the cores", 50.0, "least")
    names = [check.name for check in check_clocks(MachineTree(tmp_path / "other").roots)]
    assert "clock of the cores" not in names


@pytest.mark.mp
def test_gpus_are_asked_for_by_their_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine of these tests has a GPU: the program prints what one on an H200 does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 0, NVIDIA H200, 570.86.15, 1980, 1980, 0x0000000000000000, 0\n"
        "echo 1, NVIDIA H200, 570.86.15, 345, 1980, 0x0000000000000048, 2\n"
        "echo 2, NVIDIA T4, 570.86.15, [N/A], 1590, [N/A], [N/A]\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    checks = {check.name: check for check in check_clocks(MachineTree(tmp_path / "tree").roots)}
    assert checks["clock of cuda:0"].passed
    assert checks["clock of cuda:0"].value == 100.0
    slowed = checks["clock of cuda:1"]
    assert not slowed.passed
    assert slowed.reason == "it is slowed down because of heat or power (reasons 0x48)"
    assert checks["memory errors of cuda:0"].passed
    assert not checks["memory errors of cuda:1"].passed
    assert "clock of cuda:2" not in checks
    assert gpu_states(by_program=False) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_products_of_a_gpu_are_looked_at() -> None:
    device = torch.device("cuda", 0)
    assert check_memory(device, 1 << 28).passed
    rate, bits = check_device(device)
    assert rate.passed
    assert bits.passed


def test_a_link_of_this_machine_is_measured_both_ways() -> None:
    with LinkServer("127.0.0.1") as server, LinkClient(server.address) as client:
        offset_s, latency_s = client.clock()
        assert abs(offset_s) <= latency_s + 0.001
        found = client.measure()
    assert found.bytes_per_s > 1e6
    assert 0 < found.latency_s < 1


def test_a_stranger_measures_nothing() -> None:
    with LinkServer("127.0.0.1") as server:
        host, port, token = server.address.split()
        other = f"{host} {port} {'0' * len(token)}"
        with LinkClient(other) as client, pytest.raises((EOFError, ConnectionError)):
            client.clock()


def test_a_report_is_json_and_a_table() -> None:
    node = HealthReport("a", (check_memory(CPU, 1 << 20), bits_check("bits", {"core 0": "ab"})))
    report = JobReport((node, HealthReport("b")))
    said = json.loads(report.to_json())
    assert (said["passed"], [found["passed"] for found in said["nodes"]]) == (False, [False, True])
    assert {*said["nodes"][0]["checks"][0]} == {
        *("name", "value", "unit", "comparison", "share", "limit", "passed", "reason")
    }
    rows = rows_of(report.nodes)
    assert rows[0] == ("a", "memory of cpu", "1 MiB", "", "ok")
    assert rows[1][-1].startswith("FAILED: equal products have other bits")
    assert report.verdict() == [f"a: bits: {node.checks[1].reason}"]
    assert JobReport((HealthReport("b"),)).verdict() == ["1 node: nothing is wrong"]
