"""Tensor-parallel products beside their communication: python benchmarks/tensor_strips.py

Two ranks, each in a network namespace of its own with a cable of limited rate (see link.py), train
one model with its products cut into 1, 2, 4, 8 strips (`numerics.tensor_strips`), and once with
each collective waited for as soon as it has begun. The rate is such
that communication takes half as long as computation. A sub-layer (the MLP, forwards and backwards)
and a whole step are timed. Needs Linux, root and iproute2.

First with an emulated device: each matrix product sleeps for as long as a device would compute it,
which leaves the processors to the messages. Then with products that are computed here, so that the
ranks' products and the threads of their messages share the cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from link import cables
from support.processes.cluster import Cluster
from tensor_strips_ranks import EXCHANGES, RANKS, Sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--strips", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", help="path of the results, without kind and ending")
    parser.add_argument("--emulated-gflops", type=float, default=100, help="a second, of a rank")
    given = parser.parse_args()
    here = Sizes(
        given.layers, given.hidden, given.seq_len, tuple(given.strips), given.repetitions, 0
    )
    contestants = {
        "emulated": replace(here, flops_per_s=given.emulated_gflops * 1e9),
        "computed": here,
    }
    with cables(RANKS) as net:

        def run(wanted: Sizes) -> dict[str, dict[str, list[float]]]:
            with closing(Cluster(RANKS)) as cluster:
                nodes = net.places(RANKS)
                results = cluster.run(
                    "tensor_strips_ranks:measure", RANKS, nodes=nodes, sizes=wanted, timeout_s=3600
                )
            return results[0]

        for name, sizes in contestants.items():
            net.limit(10_000)
            first = run(replace(sizes, strips=(1,), repetitions=3))
            computed = Measurement("", tuple(first["computation"][""])).median_s
            sent = EXCHANGES * sizes.seq_len // RANKS * sizes.hidden * 4
            mbit = round(sent * 8e-6 / (computed / 2))
            net.limit(mbit)
            found = run(sizes)
            note = f"{sizes}; computation of the sub-layer {computed * 1e3:.0f} ms; {mbit} Mbit/s"
            for kind in ("sub-layer", "step"):
                rows = [Measurement(name, tuple(times)) for name, times in found[kind].items()]
                baseline = {row.name: rows[0].median_s for row in rows}
                path = f"{given.json}-{kind}-{name}.json" if given.json else None
                title = f"tensor-parallel {kind}, products {name}"
                report(title, rows, baseline, json_path=path, note=note)


if __name__ == "__main__":
    main()
