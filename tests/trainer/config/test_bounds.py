"""A number in a configuration, however large, takes neither the machine's memory nor its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config.extent import block_count
from holdfast.trainer.config.loading import load_config
from holdfast.trainer.config.ranges import RANGES
from holdfast.trainer.config.sections import RunConfig
from holdfast.trainer.models import FAMILIES, family_of
from holdfast.trainer.plan_report import plan_report
from holdfast.trainer.run.machine import (
    Machine,
    free_ports,
    free_threads,
    idle_cores_note,
    require_descriptors,
    require_ports,
    require_processes,
    require_room,
    require_threads,
    this_machine,
)
from holdfast.trainer.run.throughput import measure_throughput
from holdfast.trainer.step import plan_of
from support.runs.commands import environment, holdfast

FUZZED = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 150
CHECKED_ELSEWHERE = {"data.eval_fraction"}
"""Numbers with a check of their own; see test_config.py."""
BIG = Machine(cores=64, memory_bytes=1 << 40)
SMALL = Machine(cores=2, memory_bytes=8 << 30)


def test_every_number_of_a_configuration_has_a_range(smallest: Path) -> None:
    config = load_config(smallest)
    numbers = {
        f"{section.name}.{key}"
        for section in msgspec.structs.fields(RunConfig)
        for key, value in msgspec.to_builtins(getattr(config, section.name)).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    } | {
        f"model.{key.name}"
        for name in FAMILIES
        for key in msgspec.structs.fields(family_of(name).section)
        if isinstance(key.default, int | float) and not isinstance(key.default, bool)
    }
    ranged = {f"{section}.{key}" for section, keys in RANGES.items() for key in keys}
    assert numbers - ranged == CHECKED_ELSEWHERE
    assert ranged <= numbers


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=9223372036854775808", "must be at most 4096"),
        (f"model.layers=1{'0' * 4000}", "model.layers = 2**13287 and more: must be at most 4096"),
        (f"parallel.virtual=1{'0' * 30}", "is not divisible by parallel.pipeline x"),
        ("model.rope_theta=nan", "model.rope_theta = nan: must be a finite number"),
        ("model.rope_theta=0", "must be greater than 0"),
        (f"model.from_hf={'x' * 5000}", "x…: its config.json cannot be read: File name too long"),
        ("model.init_std=inf", "must be a finite number"),
        ("offload.limit_gib=inf", "must be a finite number"),
        ("offload.limit_mib_per_s=1e-300", "must be 0, or 1e-06 or more"),
        ("checkpoint.timeout_s=1e308", "must be at most"),
        ("elastic.straggler_factor=nan", "must be a finite number"),
        ("elastic.verify_every=-1", "must be 0 or more"),
        ("parallel.data=1048577", "must be at most 1048576"),
        ("train.global_batch=1000000", "at most 131072; raise train.micro_batch"),
        ("parallel.data=1048576 and train.global_batch=4194304", "2097152 micro-batches: at most"),
        ("optimizer.block_elements=1 and model.vocab=1000000", "set it to 8 or more"),
        ("parallel.tensor=1024 and model.heads=1024 and model.hidden=2048 and model.kv_heads=1024"
         " and model.intermediate=1024 and model.vocab=1024 and train.seq_len=1024",
         "the square of the tensor degree"),
        ("checkpoint.path=a\x00b", "must not have control characters"),
        (f"offload.path={'a' * 5000}", "has 5000 bytes; at most 4096"),
        (f"checkpoint.path=a/{'ä' * 128}/b", "a name in it has 256 bytes; at most 255"),
        ('data.path=["a\\u001bb"]', "must not have control characters"),
        ("model.\x1b[31m=1", "model.\\x1b[31m is not a key"),
        ("train.steps=\udcff", "is not UTF-8 text"),
    ],
    ids=lambda value: value[:40].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_what_no_machine_can_train_is_one_line(smallest: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(smallest, override.split(" and "))
    lines = [line for line in str(caught.value).splitlines() if said in line]
    assert len(lines) == 1, str(caught.value)
    assert len(lines[0]) < 300
    assert lines[0].isprintable()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is not valid TOML"),
        (f"[train]\nsteps = 1{'0' * 5000}\n", "is not valid TOML"),
        ("x" * (1 << 20) + "x", "has at most 1,048,576"),
        ("train = 1\n", "train = 1 is a key outside a section"),
    ],
    ids=lambda text: text[:12],
)
def test_a_file_that_no_parser_takes_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.toml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_blocks_that_are_counted_are_those_of_the_plan(smallest: Path) -> None:
    for tied in ("true", "false"):
        config = load_config(
            smallest,
            [f"model.tie_embeddings={tied}", "parallel.tensor=3", "parallel.pipeline=2",
             "parallel.sequence_parallel=false", "optimizer.block_elements=1000"],
        )  # fmt: skip
        assert block_count(config) == sum(map(len, plan_of(config).blocks))


def test_a_layout_of_thousands_of_ranks_is_planned_without_starting_a_process(
    smallest: Path,
) -> None:
    """The test is not marked mp: a process that is started fails it (conftest.py)."""
    overrides = ["model.layers=8", "parallel.data=1000", "parallel.pipeline=4",
                 "train.global_batch=4000",
                 "train.recompute=auto", "train.activation_gib=1", "offload.activations=ssd",
                 "elastic.enabled=true"]  # fmt: skip
    config = load_config(smallest, overrides)
    report = plan_report(config, lost=range(64))
    assert sum(len(numbers) for numbers in report.plan.micro_batches) == 2000
    for refused in (
        lambda: require_room(config, config.parallel.ranks, BIG),
        lambda: measure_throughput(config, config.parallel.ranks),
    ):
        with pytest.raises(ConfigError, match="4000 processes, but this machine"):
            refused()


@pytest.mark.mp
def test_the_machine_has_room_for_what_fits_and_no_more(smallest: Path) -> None:
    config = load_config(smallest, ["parallel.data=8"])
    require_room(config, 8, SMALL)
    require_room(config, 8)
    with pytest.raises(ConfigError, match="--workers 65: 65 processes, but this machine"):
        require_processes(65, "--workers 65", SMALL)
    arena = load_config(smallest, ["checkpoint.arena_mib=8192"])
    require_room(arena, 1, SMALL)
    with pytest.raises(ConfigError, match=r"arena_mib = 8192: the 2 ranks here would take 16.0 Gi"):
        require_room(arena, 2, SMALL)
    threads = load_config(smallest, ["train.threads_per_rank=100"])
    with pytest.raises(ConfigError, match="at most 32 a core"):
        require_room(threads, 1, SMALL)
    large = load_config(
        smallest,
        ["model.hidden=8192", "model.intermediate=28672", "model.heads=64", "model.kv_heads=8",
         "model.layers=80", "optimizer.block_elements=33554432"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"need about 1,\d\d\d\.\d GiB, and this machine has 8.0"):
        require_room(large, 1, SMALL)
    assert this_machine().cores >= 1
    assert this_machine().memory_bytes > 1 << 28


def test_cores_that_a_run_leaves_idle_are_said(smallest: Path) -> None:
    config = load_config(smallest)
    said = idle_cores_note(config, 4, BIG)
    assert "4 ranks with train.threads_per_rank = 1 on 64 cores; 16 would use them all" in said
    assert idle_cores_note(config, 2, SMALL) == ""
    assert idle_cores_note(load_config(smallest, ["train.threads_per_rank=16"]), 4, BIG) == ""
    assert idle_cores_note(config, 1, replace(BIG, has_gpu=True)) == ""


def test_ranks_that_lack_local_ports_to_connect_are_refused() -> None:
    assert free_ports(50) == 50
    require_ports(4, 0, lambda most: min(most, 40))
    require_ports(4, 2, lambda most: min(most, 120))
    require_ports(1, 0, lambda most: 0)
    with pytest.raises(ConfigError, match=r"4 ranks here need at least 40 local ports .* 39 are"):
        require_ports(4, 0, lambda most: 39)
    with pytest.raises(ConfigError, match="need at least 120 local ports to connect, and 119 are"):
        require_ports(4, 2, lambda most: 119)


@pytest.mark.mp
def test_ranks_that_may_not_start_their_threads_are_refused() -> None:
    assert free_threads(50) == 50
    require_threads(4, 0, 1, lambda most: min(most, 44))
    require_threads(4, 2, 1, lambda most: min(most, 116))
    with pytest.raises(ConfigError, match=r"4 ranks here need up to 44 processes .*, and 43 more"):
        require_threads(4, 0, 1, lambda most: 43)
    with pytest.raises(ConfigError, match="need up to 120 processes and threads, and 119 more may"):
        require_threads(4, 2, 2, lambda most: 119)


def test_ranks_whose_processes_may_not_open_enough_are_refused() -> None:
    require_descriptors(4)
    require_descriptors(4, 256)
    said = r"4 ranks here need up to 256 .* its limit is 255; raise the limit \(ulimit -n\)"
    with pytest.raises(ConfigError, match=said):
        require_descriptors(4, 255)


@pytest.mark.mp
def test_a_fuzzed_configuration_is_planned_or_refused(tmp_path: Path) -> None:
    """Within 1 GiB and 30 s of processor time each; see support/runs/fuzzed_configs.py."""
    done = subprocess.run(
        [sys.executable, "-m", "support.runs.fuzzed_configs", "0", str(FUZZED), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    *wrong, counts = [json.loads(line) for line in done.stdout.splitlines()]
    assert not wrong, wrong[0]
    assert counts["accepted"] > FUZZED // 20, counts
    assert counts["accepted"] + counts["refused"] == FUZZED, counts


@pytest.mark.mp
@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("plan", ["--lost", "0-1000000000"], "--lost 1000000000: the layout has ranks 0 to 0"),
        ("plan", ["--lost", "1" * 5000], "the layout has ranks 0 to 0"),
        ("convert", ["out", "--to", "hf", "--value", "x=\u00b2"], "give NAME=NUMBER, as heads=32"),
        ("convert", ["out", "--to", "hf", "--memory-limit", "1" * 5000], "give a number of bytes"),
        ("plan", ["--lost", "0-"], "--lost 0-: give ranks as 2 or 2,5-7"),
        ("plan", ["--lost", "1-0", "--set", "parallel.data=2"], "begins with the lower one"),
        ("plan", ["--tflops", "1e400", "--gbytes", "inf"], "--tflops inf: must be 0 (unknown)"),
        ("plan", ["--gbytes", "nan"], "--gbytes nan: must be 0 (unknown)"),
        ("plan", ["--measure", "100000"], "100000 processes, but this machine"),
        ("train", ["--set", "parallel.data=4096", "--set", "train.global_batch=8192"],
         "4096 processes, but this machine"),
        ("check", ["--set", "parallel.data=4096", "--set", "train.global_batch=8192"],
         "4096 processes, but this machine"),
    ],
)  # fmt: skip
def test_a_command_refuses_what_the_machine_cannot_hold(
    smallest: Path, command: str, arguments: list[str], said: str
) -> None:
    done = holdfast(smallest.parent, command, str(smallest), *arguments, timeout_s=120)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(smallest.parent.glob("runs/*"))
