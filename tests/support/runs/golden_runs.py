"""Runs whose bits are written down in tests/fixtures/golden/bits.json, and the processors they hold
for.

The same program gives the same bits on one kind of processor. Between kinds, or with another torch,
the kernels of matrix products and of exp and sqrt may round otherwise; so a record is kept for each
kind.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from holdfast.trainer.config.loading import RunConfig, load_config
from support.runs.small_runs import make_config, run_training

TESTS = Path(__file__).resolve().parents[2]
RECORDS = TESTS / "fixtures" / "golden" / "bits.json"
RECORD_COMMAND = "python tests/fixtures/golden/record.py"

_TENSOR_RUN: dict[str, dict[str, Any]] = {
    "model": {"layers": 2},
    "train": {"global_batch": 8, "micro_batch": 4},
}


def _tied(precision: str) -> dict[str, dict[str, Any]]:
    return {"model": {"tie_embeddings": True}, "train": {"precision": precision, "steps": 6}}


def _tensor_parallel(tensor: int, *, sequence_parallel: bool) -> dict[str, dict[str, Any]]:
    layout = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    return {**_TENSOR_RUN, "parallel": layout}


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "one process": {},
    "tied fp32": _tied("fp32"),
    "tied bf16": _tied("bf16"),
    "bf16": {"train": {"precision": "bf16", "steps": 8}},
    "fp64": {"train": {"precision": "fp64", "steps": 6}},
    "fast": {"numerics": {"reduction": "fast"}},
    "learning rate wsd, no clipping": {
        "train": {"steps": 8, "clip_grad_norm": 0.0},
        "optimizer": {"schedule": "wsd"},
    },
    "tensor 2": {
        "model": {"layers": 2},
        "train": {"steps": 6, "global_batch": 6},
        "parallel": {"tensor": 2},
    },
    "tensor run, 1": _TENSOR_RUN,
    "tensor run, 2": _tensor_parallel(2, sequence_parallel=False),
    "tensor run, 2, sequence parallel": _tensor_parallel(2, sequence_parallel=True),
    "tensor run, 4": _tensor_parallel(4, sequence_parallel=False),
    "tensor run, 4, sequence parallel": _tensor_parallel(4, sequence_parallel=True),
}
"""By name: the sections by which a run differs from `small_runs.SMALL`. Those without a [parallel]
table stand for every layout that tests/trainer/test_same_bits.py compares with them."""
TINY = "examples/tiny.toml"
_TINY_OVERRIDES = (
    # Its own data is the text of Python's standard library, which changes with every Python
    # release.
    'data.kind="synthetic"',
    "train.steps=10",
    "train.eval_every=0",
    "optimizer.warmup_steps=5",
    "elastic.enabled=false",
    "elastic.chaos=[]",
    "log.trace_steps=[]",
    'train.device="cpu"',
)
NAMES = (*CASES, TINY)
NEAR = {"fp32": 1e-5, "bf16": 1e-2, "fp64": 1e-12}
"""By precision: how far losses may be from each other on two kinds of processor, relatively."""


def config_of(name: str) -> RunConfig:
    """The configuration of a golden run."""
    if name == TINY:
        return load_config(TESTS.parent / TINY, _TINY_OVERRIDES)
    return make_config(**CASES[name])


class Kind(msgspec.Struct, frozen=True):
    """What the bits of a run may depend on beside its configuration.

    The instruction set of Holdfast's own kernels is not in it: they give the same bits with any.
    """

    torch: str
    capability: str
    """The vector instructions that torch's CPU kernels use."""
    processor: str
    """Vendor, family and model: matrix products choose their kernels by them."""

    def __str__(self) -> str:
        return f"torch {self.torch} {self.capability} on {self.processor}"


def this_kind() -> Kind:
    """The kind that this process computes on."""
    return Kind(
        torch=str(torch.__version__),
        capability=torch.backends.cpu.get_cpu_capability(),
        processor=_processor(),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    first, *_ = cpuinfo.read_text().split("\n\n")
    lines = [line.partition(":") for line in first.splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    wanted = ("vendor_id", "CPU implementer", "cpu family", "CPU part", "model")
    return " ".join([platform.machine(), *(facts[key] for key in wanted if key in facts)])


class GoldenRun(msgspec.Struct, frozen=True):
    """What a run gave: exact hexadecimal floats by step, and a digest of the parameters at its
    end.
    """

    losses: list[str]
    norms: list[str] = []
    digest: str = ""


class Record(msgspec.Struct, frozen=True):
    """The golden runs on one kind of processor."""

    kind: Kind
    runs: dict[str, GoldenRun]


def read_records(path: Path = RECORDS) -> list[Record]:
    """The records in a file, one for each kind of processor."""
    return msgspec.json.decode(path.read_bytes(), type=list[Record])


def runs_of_kind(records: list[Record], kind: Kind) -> dict[str, GoldenRun] | None:
    """What a record of that kind holds; None when there is none."""
    return next((record.runs for record in records if record.kind == kind), None)


def assert_near(run: GoldenRun, recorded: GoldenRun, precision: str) -> None:
    """Whether two runs agree as well as two kinds of processor do: losses of all steps, not
    bits.
    """
    assert len(run.losses) == len(recorded.losses)
    for step, (ours, theirs) in enumerate(zip(run.losses, recorded.losses, strict=True), start=1):
        expected = pytest.approx(float.fromhex(theirs), rel=NEAR[precision])
        assert float.fromhex(ours) == expected, f"the loss of step {step}"


def write_records(records: list[Record]) -> None:
    plain = msgspec.to_builtins(sorted(records, key=lambda record: str(record.kind)))
    RECORDS.write_text(json.dumps(plain, indent=1) + "\n")


def run_golden(cluster: Any, name: str) -> GoldenRun:
    """Run one on the pool of workers."""
    return msgspec.convert(run_training(cluster, config_of(name)), GoldenRun)
