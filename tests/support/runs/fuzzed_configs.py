"""Configurations as a careless or hostile hand writes them, each from a number.

`python -m support.runs.fuzzed_configs FIRST COUNT` plans them in this process, whose memory is
limited, and prints a line of JSON for each that ends in any other way than accepted or refused.
"""

from __future__ import annotations

import io
import json
import math
import random
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config.loading import convert_config, dump_toml, load_config
from holdfast.trainer.plan_report import plan_report
from holdfast.trainer.run.machine import require_room

MOST_BYTES = 1 << 30
"""The address space of a process that plans."""
MOST_CPU_S = 30.0
"""Processor time after which a plan counts as endless; a plan takes well below 5 s."""
BASE: Mapping[str, Mapping[str, Any]] = {
    "model": {"family": "llama", "layers": 4, "hidden": 96, "vocab": 320}
}

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, 16, 63, 64, 255, 1000, 4096, 65_536, 100_000, 10**6, 2**20 + 1, 2**31, 2**53,
    2**63, 2**64, 10**40, 10**5000, -1, -2, -(2**63), -(10**5000),
    0.0, -0.0, 0.5, 1.5, 1e-300, 1e-30, 1e30, 1e308, -1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    True, False, "", "x", "none", "é", "日本", "a\x00b", "a\nb", "\x1b[31m", "\udcff",
    "a" * 5000, "../..", "/dev/null", "s3://", "s3://a/b", "localhost", "localhost:1", "1",
    "[::1]:x", [], [0], [1] * 50, [-1, 2], ["a"], [math.nan], {}, {"a": 1}, [[1]], [{}],
)  # fmt: skip


def keys() -> list[tuple[str, str]]:
    """Every (section, key) of a configuration."""
    whole = msgspec.to_builtins(convert_config(BASE))
    return [(section, key) for section, values in whole.items() for key in values]


def fuzzed(number: int) -> dict[str, dict[str, Any]]:
    """The configuration of this number: some keys of a sound one have other values. Pure."""
    chance = random.Random(number)
    table: dict[str, dict[str, Any]] = {name: dict(values) for name, values in BASE.items()}
    if chance.random() < 0.5:
        _sizes(table, chance)
    known = keys()
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3, 6))):
        section, key = chance.choice(known)
        if chance.random() < 0.03:
            key = chance.choice(("laers", "lr", "x", "é", "\x1b[31m", "a" * 3000))
        value = chance.choice(NUMBERS if chance.random() < 0.7 else OTHERS)
        table.setdefault(section, {})[key] = value
    return table


def _sizes(table: dict[str, dict[str, Any]], chance: random.Random) -> None:
    """Set sizes that often fit one another, small and far beyond this machine."""

    def power(most: int) -> int:
        return 2 ** chance.randint(0, most)

    heads = power(7)
    tensor, pipeline, data = power(4), power(5), power(17 if chance.random() < 0.2 else 6)
    virtual = chance.choice((1, 1, 2, 4))
    schedule = chance.choice(("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v"))
    micro_batch = power(4)
    table["model"] |= {
        "layers": pipeline * virtual * chance.choice((1, 2, 3)),
        "hidden": heads * chance.choice((2, 16, 64, 128)),
        "heads": heads,
        "kv_heads": heads // power(2) or 1,
        "intermediate": power(16),
        "vocab": chance.choice((257, 320, 50_000, 128_256)),
        "max_seq_len": 2**31,
        "tie_embeddings": chance.random() < 0.3,
    }
    table["parallel"] = {
        "tensor": tensor,
        "pipeline": pipeline,
        "data": data,
        "virtual": virtual,
        "schedule": schedule,
        "sequence_parallel": chance.random() < 0.7,
    }
    table["train"] = {
        "seq_len": power(17),
        "micro_batch": micro_batch,
        "global_batch": micro_batch * data * power(6),
        "recompute": chance.choice(("none", "full", "selective", "auto")),
        "activation_gib": chance.choice((0.0, 1e-3, 1.0, 100.0)),
        "precision": chance.choice(("fp32", "bf16")),
    }
    table["elastic"] = {"enabled": chance.random() < 0.5, "redundancy": chance.randint(0, 2)}
    table["offload"] = {"activations": chance.choice(("none", "none", "ssd"))}


def as_overrides(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table as values of --set, as far as TOML can write them."""
    return [
        f"{section}.{key}={_text(value)}"
        for section, values in table.items()
        for key, value in values.items()
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, int) and value.bit_length() > 10_000:
        return f"{'-' if value < 0 else ''}1{'0' * 5000}"
    return repr(value)


def outcome(attempt: Callable[[], None]) -> str:
    """ "accepted", "refused", or what went wrong."""
    try:
        attempt()
    except ConfigError as error:
        lines = str(error).splitlines()
        long = [line for line in lines if len(line) > 1000]
        return "refused" if lines and all(lines) and not long else f"unclear: {lines}"[:500]
    except BaseException:
        return traceback.format_exc()
    return "accepted"


def plan_of_number(number: int, folder: Path) -> None:
    """Do what `plan` does with the configuration of this number, and what `train` checks first."""
    table = fuzzed(number)
    config = load_config(folder / "base.toml", as_overrides(table))
    report = plan_report(config)
    json.dumps(report.as_dict())
    Console(file=io.StringIO(), width=100).print(report.renderable(100))
    written = folder / "resolved.toml"
    written.write_text(dump_toml(config), encoding="utf-8")
    if load_config(written) != config:
        raise AssertionError("the resolved configuration reads back as another one")
    require_room(config, config.parallel.ranks)


def main(first: int, count: int, folder: Path) -> None:
    """Plan `count` configurations from number `first` on; print what went wrong, and the counts."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    (folder / "base.toml").write_text('[model]\nfamily = "llama"\nlayers = 1\nhidden = 96\n')
    counts = {"accepted": 0, "refused": 0}
    signal.signal(signal.SIGPROF, _endless)
    for number in range(first, first + count):
        signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
        found = outcome(lambda number=number: plan_of_number(number, folder))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found in counts:
            counts[found] += 1
        else:
            sys.stdout.write(json.dumps({"number": number, "wrong": found}) + "\n")
    sys.stdout.write(json.dumps(counts) + "\n")


def _endless(*_: object) -> None:
    raise TimeoutError(f"no plan within {MOST_CPU_S:g} s of processor time")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
