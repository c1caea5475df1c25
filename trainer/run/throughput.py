"""The measured throughput of a rank and its drive, for train.recompute = "auto".

One process measures before the workers start, so that every rank has the same figures and makes the
same plan. The run's folder keeps them for processes that resume or join the run. Needs no torch.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import decode_json, read_regular
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run.machine import require_processes

_PROBE_S = 180.0
"""The longest time of a measurement, once its processes have started."""

_Rate = Annotated[float, Meta(gt=0, le=1e9)]
_MOST_BYTES = 1 << 16


class Throughput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The throughput of one rank while the other ranks of its machine measure too."""

    tflops: _Rate
    """10^12 operations a second in the forward pass of one transformer layer."""
    drive_gbytes: _Rate
    """10^9 bytes a second to the place of offloaded activations or back, whichever is slower."""


def needs_throughput(config: RunConfig) -> bool:
    """Whether the plan depends on rates that the configuration does not give. Pure."""
    train, offload = config.train, config.offload
    if train.recompute != "auto" or offload.activations == "none":
        return False
    return not (train.tflops and offload.drive_gbytes)


def with_throughput(config: RunConfig, rates: Throughput, *, instead: bool = False) -> RunConfig:
    """The configuration with these rates: where it has none, or with `instead` everywhere. Pure.

    A rate of 0 is unknown.
    """
    pairs = [(config.train.tflops, rates.tflops), (config.offload.drive_gbytes, rates.drive_gbytes)]
    tflops, drive_gbytes = (new or old if instead else old or new for old, new in pairs)
    return msgspec.structs.replace(
        config,
        train=msgspec.structs.replace(config.train, tflops=tflops),
        offload=msgspec.structs.replace(config.offload, drive_gbytes=drive_gbytes),
    )


def recorded_throughput(config: RunConfig, root: Path) -> RunConfig:
    """The configuration with the rates in a run's folder, if it needs any. Local.

    Raises:
        ConfigError: the rates are not there.
    """
    if not needs_throughput(config):
        return config
    rates = _recorded(root)
    if rates is None:
        raise ConfigError(
            f"{_path(root)}, which the first process has written, cannot be read here; put --out "
            "in a folder that all machines share, or set train.tflops and offload.drive_gbytes"
        )
    return with_throughput(config, rates)


def resolve_throughput(
    config: RunConfig,
    root: Path,
    *,
    ranks_here: int,
    fresh: bool,
    say: Callable[[str], None],
) -> RunConfig:
    """The configuration with all rates that its plan needs, recorded or measured now.

    The process that opens the run calls it, with the folder locked.

    Args:
        ranks_here: the ranks of this machine; as many processes measure at once.
        fresh: measure even if the folder has rates, because the run starts over.
        say: gets a line about the measurement.
    Raises:
        ConfigError: the rates cannot be measured.
    """
    if not needs_throughput(config):
        return config
    rates = None if fresh else _recorded(root)
    if rates is None:
        rates = measure_throughput(config, ranks_here)
        text = json.dumps(msgspec.to_builtins(rates)) + "\n"
        try:
            write_whole(_path(root), text.encode())
        except OSError as error:
            told = f"{_path(root)} cannot be written: {error.strerror}"
            raise ConfigError(told) from error
        say(f"measured {described(rates)}; kept in {_path(root)}")
    return with_throughput(config, rates)


def measure_throughput(config: RunConfig, ranks_here: int) -> Throughput:
    """The rates of the slowest of `ranks_here` processes that measure at once. Local.

    Raises:
        ConfigError: a process fails, or does not end in time; the machine has no room for so many.
    """
    require_processes(ranks_here, f"measuring with {ranks_here} ranks")
    text = msgspec.json.encode(config).decode()
    probes = [
        subprocess.Popen(
            [sys.executable, "-m", "holdfast.trainer.run.throughput_probe", str(local_rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local_rank in range(ranks_here)
    ]
    try:
        for probe in probes:
            _write(probe, text)
        deadline_s = monotonic() + _PROBE_S
        for probe in probes:  # they measure together, not while others still start
            _expect(probe, _first_line(probe, deadline_s))
        for probe in probes:
            _write(probe, "go")
        found = []
        for probe in probes:
            output, errors = probe.communicate(timeout=_PROBE_S)
            _expect(probe, output, errors)
            found.append(decode_json(output, Throughput))
    except ValueError as error:
        raise _unmeasured(f"no rates: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise _unmeasured(f"no answer within {_PROBE_S:g} s") from error
    finally:
        for probe in probes:
            probe.kill()
            probe.communicate()
    return Throughput(
        min(rates.tflops for rates in found), min(rates.drive_gbytes for rates in found)
    )


def assumed(config: RunConfig) -> str:
    """The rates on which the choice of a plan depended, in words; empty for other plans. Pure."""
    train, offload = config.train, config.offload
    if train.recompute != "auto" or offload.activations == "none":
        return ""
    if needs_throughput(config):
        return (
            "not known: a drive that takes everything in time is assumed "
            "(a run measures; --measure)"
        )
    return f"{train.tflops:.3g} TFLOP/s and {offload.drive_gbytes:.3g} GB/s to the drive, each rank"


def described(rates: Throughput) -> str:
    """The rates in words."""
    return (
        f"{rates.tflops:.3g} TFLOP/s and {rates.drive_gbytes:.3g} GB/s to the drive, each rank "
        "(train.tflops, offload.drive_gbytes)"
    )


def _first_line(probe: subprocess.Popen[str], deadline_s: float) -> str:
    assert probe.stdout is not None
    if not select.select([probe.stdout], [], [], max(0.0, deadline_s - monotonic()))[0]:
        raise subprocess.TimeoutExpired(probe.args, _PROBE_S)
    return probe.stdout.readline()


def _write(probe: subprocess.Popen[str], line: str) -> None:
    assert probe.stdin is not None
    try:
        probe.stdin.write(line + "\n")
        probe.stdin.flush()
    except BrokenPipeError:
        _expect(probe, "")


def _expect(probe: subprocess.Popen[str], answer: str, errors: str = "") -> None:
    """Raise ConfigError if a probe has ended without an answer."""
    if not answer:
        reason = errors or (probe.stderr.read() if probe.stderr is not None else "")
        raise _unmeasured(reason.strip().rpartition("\n")[2] or "a process ended without an answer")


def _unmeasured(reason: str) -> ConfigError:
    return ConfigError(
        f"the rates for train.recompute = 'auto' cannot be measured: {reason}; set train.tflops "
        "and offload.drive_gbytes"
    )


def _path(root: Path) -> Path:
    return root / "rates.json"


def _recorded(root: Path) -> Throughput | None:
    """The recorded rates; None if there are none that can be read."""
    try:
        return decode_json(read_regular(_path(root), _MOST_BYTES), Throughput)
    except (OSError, ValueError):
        return None
