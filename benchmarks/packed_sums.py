"""Bytes that packed gradient sums of real training take, by run length, step and granularity.

One process trains a Llama on sources of the standard library (bytes, or a vocabulary trained on
them); after the steps named, the sums that the exact reduction would send are measured: in runs of
several lengths, each with the least width in whole bytes, half bytes or bits, and one byte of
header. The format of csrc/packing.h is 512 and bytes. Kinds of parameters are cut into runs each
by itself; "all" is the whole buffer in one piece, as spans travel.

    python benchmarks/packed_sums.py [--precision bf16] [--small] [--batch 2] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.distributed import HashStore

sys.path.insert(0, str(Path(__file__).parent))

from harness import machine
from holdfast.parallel.optimizer import GradientAccumulator, ParameterBuffer
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.step.build import open_training
from holdfast.trainer.worlds.world import local_world

STEPS = (1, 20, 100)
RUNS = (256, 512, 1024, 4096)
GRANULARITIES = {"bytes": 8, "half bytes": 4, "bits": 1}
FOLDERS = ("asyncio", "email", "idlelib", "unittest", "xml", "json", "http")
SMALL: Mapping[str, Any] = {
    "layers": 4, "hidden": 96, "intermediate": 256, "heads": 6, "kv_heads": 3, "vocab": 320,
}  # fmt: skip
LARGER: Mapping[str, Any] = {
    "layers": 6, "hidden": 512, "intermediate": 1024, "heads": 8, "kv_heads": 8, "vocab": 8192,
}  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of the parameter with this Hugging Face name."""
    for kind, part in (
        ("norms", "norm"),
        ("embedding", "embed_tokens"),
        ("head", "lm_head"),
        ("attention", "self_attn"),
        ("MLP", "mlp"),
    ):
        if part in name:
            return kind
    raise ValueError(f"{name} is of no known kind")


def bits_of_runs(sums: Tensor, run: int) -> list[tuple[int, int]]:
    """(elements, bits that hold every value in two's complement) of each run."""
    found = []
    for part in sums.split(run):
        least, greatest = int(part.min()), int(part.max())
        largest = max(~least if least < 0 else least, greatest)
        found.append((len(part), largest.bit_length() + 1 if least or greatest else 0))
    return found


def packed_bytes(parts: Iterable[Tensor], run: int, bits: int) -> float:
    """Bytes an element of `parts` in runs of their own, widths in multiples of `bits`."""
    runs = [found for part in parts for found in bits_of_runs(part, run)]
    payload = sum(count * -(-size // bits) * bits / 8 for count, size in runs)
    return (payload + len(runs)) / sum(count for count, _ in runs)


def measured(accumulator: GradientAccumulator, buffer: ParameterBuffer) -> dict[str, Any]:
    """Bytes an element, by kind of parameter, then run and granularity."""
    kinds: dict[str, list[Tensor]] = {}
    for segment in buffer.segments:
        part = buffer.view(accumulator.sums, segment).reshape(-1)
        kinds.setdefault(kind_of(segment.spec.name), []).append(part)
    kinds["all"] = [accumulator.sums]
    return {
        kind: {
            f"{run}, {name}": packed_bytes(parts, run, bits)
            for run in RUNS
            for name, bits in GRANULARITIES.items()
        }
        | {"elements": sum(len(part) for part in parts)}
        for kind, parts in kinds.items()
    }


def tokenizer_of(files: Iterable[Path], vocab: int, path: Path) -> None:
    """Train a byte-level BPE vocabulary and write it to `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.save(str(path))


def config_of(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    model = SMALL if arguments.small else LARGER
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for name in FOLDERS for path in sorted((library / name).glob("*.py"))]
    sources = [path for path in sources if path.stat().st_size]
    tokenizer = "bytes"
    if not arguments.small:
        tokenizer = str(folder / "tokenizer.json")
        tokenizer_of(sources, model["vocab"], Path(tokenizer))
    return convert_config(
        {
            "model": {"family": "llama", **model},
            "data": {"kind": "text", "path": [str(s) for s in sources], "tokenizer": tokenizer},
            "train": {
                "steps": STEPS[-1],
                "seq_len": 256,
                "global_batch": arguments.batch,
                "micro_batch": min(2, arguments.batch),
                "precision": arguments.precision,
                "device": "cpu",
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 10},
        }
    )


def train(arguments: argparse.Namespace, config: RunConfig) -> dict[int, Any]:
    """Train in this process. Returns what was measured, by step."""
    training = open_training(config, local_world(0, 1), HashStore())
    found: dict[int, Any] = {}
    for step in range(arguments.steps):
        training.compute(step)
        if step + 1 in STEPS:
            found[step + 1] = measured(training.accumulator, training.parameter_buffer)
        outcome = training.vote(*training.reduce())
        training.apply(config.rate_of(step))
        if step + 1 in STEPS:
            told = f"step {step + 1}: loss {outcome.loss:.3f}, norm {outcome.grad_norm:.3f}"
            print(told, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--small", action="store_true", help="the model of examples/tiny.toml")
    parser.add_argument("--batch", type=int, default=2, help="sequences of 256 tokens a step")
    parser.add_argument("--steps", type=int, default=STEPS[-1])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments, Path(folder))
        found = train(arguments, config)
    width, tokens = config.model.hidden, 256 * arguments.batch
    note = f"{width} wide, {arguments.precision}, {tokens} tokens a step"
    table = Table(title="Bytes an element of packed sums", caption=note)
    ways = [f"{run}, {name}" for run in RUNS for name in GRANULARITIES]
    for column in ("step", "kind", "elements", *ways):
        table.add_column(column, justify="right")
    for step, kinds in found.items():
        for kind, values in kinds.items():
            cells = [f"{values[way]:.3f}" for way in ways]
            table.add_row(str(step), kind, f"{values['elements']:,}", *cells)
    Console(width=170).print(table)
    if arguments.json:
        record = {"title": table.title, "machine": machine(), "note": note, "steps": found}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
