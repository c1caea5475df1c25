"""Experts over ranks, beside DeepSpeed's MoE layer: python benchmarks/expert_parallel.py

Four ranks, each in a network namespace of its own with a cable of limited rate (see link.py), pass
tokens through one layer of experts, forwards and backwards. Contestants have the same sizes and as
many tokens, and take turns in the same processes, one thread each. DeepSpeed's layer has the
capacity that drops no token; what it takes where it drops those beyond the mean stands beside. In
fast mode an expert computes all ranks' tokens as one matrix, in exact mode those of each rank.
Routers are as they begin, when loads differ by chance alone, and such that loads differ as they do
in training (`expert_load` in metrics.jsonl).

Then with an emulated device (each matrix product sleeps for as long as one would compute it) and a
router that prefers some experts: one copy of each, and copies in proportion to the loads. Needs
Linux, root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from expert_parallel_ranks import RANKS, Sizes, largest_load
from harness import Measurement, report
from link import cables
from support.processes.cluster import Cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--rates", default="1000,10000", help="Mbit/s of each rank's cable")
    parser.add_argument("--preferences", default="0,0.2", help="of routers; see Sizes")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--emulated-gflops", type=float, default=50, help="a second, of a rank")
    parser.add_argument("--json", help="path of the results, without kind and ending")
    given = parser.parse_args()
    sizes = Sizes(given.hidden, given.intermediate, given.experts, given.tokens, given.repetitions)
    with cables(RANKS) as net:

        def run(job: str, wanted: Sizes) -> dict[str, list[float]]:
            with closing(Cluster(RANKS, imports=("deepspeed",))) as cluster:
                nodes = net.places(RANKS)
                found = cluster.run(
                    f"expert_parallel_ranks:{job}", RANKS, nodes=nodes, sizes=wanted, timeout_s=1800
                )
            return found[0]

        for rate, preference in product(given.rates.split(","), given.preferences.split(",")):
            net.limit(int(rate))
            wanted = replace(sizes, preference=float(preference))
            found = run("beside_deepspeed", wanted)
            rows = [Measurement(name, tuple(times)) for name, times in found.items()]
            baseline = {row.name: rows[1].median_s for row in rows}
            path = f"{given.json}-{rate}-{preference}.json" if given.json else None
            report(
                f"a layer of experts over {RANKS} ranks, {rate} Mbit/s; ratio to {rows[1].name}",
                rows,
                baseline,
                json_path=path,
                note=f"most tokens of an expert: {largest_load(wanted):.2f} of the mean; {wanted}",
            )
        net.limit(10_000)
        emulated = replace(sizes, flops_per_s=given.emulated_gflops * 1e9)
        found = run("with_copies", emulated)
        rows = [Measurement(name, tuple(times)) for name, times in found.items()]
        baseline = {row.name: rows[0].median_s for row in rows}
        path = f"{given.json}-copies.json" if given.json else None
        report(
            "a skewed router, emulated products", rows, baseline, json_path=path, note=str(sizes)
        )


if __name__ == "__main__":
    main()
