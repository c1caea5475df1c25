"""What slices and shards cost: python benchmarks/atoms.py

A training step whose sequences are computed in slices (`train.context_chunks`) and whose layers in
shards (`numerics.tensor_shards`), on one rank and on as many ranks, beside the step with one of
each. Processor time of all ranks together, one thread each, in turn.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from atoms_ranks import Atoms, Sizes
from harness import Measurement, report
from support.processes.cluster import Cluster

ONE_RANK = {
    "one of each": Atoms(),
    "2 slices": Atoms(slices=2),
    "4 slices": Atoms(slices=4),
    "8 slices": Atoms(slices=8),
    "2 shards": Atoms(shards=2),
    "4 shards": Atoms(shards=4),
}
SEVERAL_RANKS = {
    "tensor {n}, one of each": Atoms(tensor=0),
    "tensor {n}, {n} shards": Atoms(tensor=0, shards=0),
    "context {n}, {n} slices, heads": Atoms(context=0, slices=0, context_exchange="heads"),
    "context {n}, {n} slices, keys": Atoms(context=0, slices=0, context_exchange="keys"),
}
"""0: as many as there are ranks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="path of the results, without precision and ending")
    given = parser.parse_args()
    for precision in given.precision:
        for ranks in given.ranks:
            sizes = Sizes(given.layers, given.hidden, given.seq_len, precision, given.repetitions)
            rows = measured(sizes, contestants(ranks), ranks)
            path = f"{given.json}-{precision}-{ranks}.json" if given.json else None
            report(
                f"a step in slices and shards on {ranks} ranks, {precision}",
                rows,
                dict.fromkeys((row.name for row in rows), rows[0].median_s),
                json_path=path,
                note=f"{sizes}",
            )


def contestants(ranks: int) -> dict[str, Atoms]:
    """The first is what the others are compared with."""
    if ranks == 1:
        return ONE_RANK
    fields = ("slices", "shards", "tensor", "context")
    several = {
        name.format(n=ranks): Atoms(
            *(getattr(atoms, field) or ranks for field in fields), atoms.context_exchange
        )
        for name, atoms in SEVERAL_RANKS.items()
    }
    return {"one rank, one of each": Atoms(), **several}


def measured(sizes: Sizes, given: dict[str, Atoms], ranks: int) -> list[Measurement]:
    """The processor time of all ranks in each step."""
    with closing(Cluster(ranks)) as cluster:
        found = cluster.run(
            "atoms_ranks:measure", ranks, sizes=sizes, contestants=given, timeout_s=3600
        )
    return [
        Measurement(name, tuple(map(sum, zip(*(times[name] for times in found), strict=True))))
        for name in given
    ]


if __name__ == "__main__":
    main()
