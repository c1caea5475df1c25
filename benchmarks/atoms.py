"""What slices and shards cost: python benchmarks/atoms.py

A training step of one process, whose sequences are computed in slices (`train.context_chunks`) and
whose layers in shards (`numerics.tensor_shards`), beside the step with one of each. Processor time
of one thread, in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.distributed import HashStore

from harness import alternate, report
from holdfast.trainer.config import convert_config
from holdfast.trainer.step import open_training
from holdfast.trainer.worlds import local_world


def stepper(
    precision: str, slices: int, shards: int, given: argparse.Namespace
) -> Callable[[], float]:
    """Computes a step; returns its processor seconds."""
    config = convert_config(
        {
            "model": {
                "family": "llama",
                "layers": given.layers,
                "hidden": given.hidden,
                "intermediate": 11 * given.hidden // 4,
                "heads": 8,
                "kv_heads": 4,
                "vocab": 4096,
                "max_seq_len": given.seq_len,
            },
            "data": {"kind": "synthetic"},
            "train": {
                "seq_len": given.seq_len,
                "global_batch": 1,
                "micro_batch": 1,
                "context_chunks": slices,
                "precision": precision,
                "device": "cpu",
            },
            "numerics": {"tensor_shards": shards},
        }
    )
    training = open_training(config, local_world(0, 1), HashStore())
    step = 0

    def run() -> float:
        nonlocal step
        start = time.process_time()
        training.compute(step)
        training.vote(*training.reduce())
        training.apply(1e-4)
        step += 1
        return time.process_time() - start

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--slices", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--shards", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="path of the results, without precision and ending")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for precision in given.precision:
        sizes = {"one of each": (1, 1)}
        sizes |= {f"{count} slices": (count, 1) for count in given.slices}
        sizes |= {f"{count} shards": (1, count) for count in given.shards}
        work = {name: stepper(precision, *both, given) for name, both in sizes.items()}
        rows = alternate(work, given.repetitions)
        baseline = dict.fromkeys(sizes, rows[0].median_s)
        path = f"{given.json}-{precision}.json" if given.json else None
        report(f"a step in slices and shards, {precision}", rows, baseline, json_path=path)


if __name__ == "__main__":
    main()
