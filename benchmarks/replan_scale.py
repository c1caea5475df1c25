"""Re-planning at 100,000 ranks, without tensors: what is computed and moved when one rank, or one
node, dies, and what is computed when its replacement joins.

The planning code is that of a run; one process, times in seconds. The lower bound of what must
move: every block whose owner no longer computes its stage (a tensor-parallel group that lost a rank
is out as a whole) and every copy that a lost rank kept, once each.

    python benchmarks/replan_scale.py [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from harness import TRILLION
from holdfast.parallel.plan.admission import next_plan
from holdfast.parallel.plan.block_transfers import held_blocks, plan_block_transfers
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.replan import Roster, with_shadows
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.planning import plan_of

TENSOR, PIPELINE, DATA = 8, 16, 782
RANKS = TENSOR * PIPELINE * DATA
NODE = 8


def first_plan() -> Plan:
    """A trillion parameters over 100,096 ranks, with one shadow per block."""
    config = msgspec.convert(
        {
            "model": TRILLION,
            "train": {
                "precision": "bf16",
                "seq_len": 4096,
                "global_batch": 4 * DATA,
                "micro_batch": 1,
            },
            "parallel": {"tensor": TENSOR, "pipeline": PIPELINE, "data": DATA},
            "optimizer": {"block_elements": 1 << 22},
        },
        RunConfig,
    )
    plan = plan_of(config)
    return with_shadows(plan, roster(plan.stage_replicas.ranks), 1)


def roster(ranks: Sequence[int]) -> Roster:
    return Roster(tuple(ranks), {rank: f"node{rank // NODE}" for rank in ranks})


def least_elements(plan: Plan, lost: set[int]) -> int:
    """Of one kind of state, what must get a new place when ranks are lost."""
    unplaced = {rank for gone in lost for rank in plan.stage_replicas.stage_replica(gone)}
    return sum(
        block.elements * ((owner in unplaced) + len(lost.intersection(shadows)))
        for index, blocks in enumerate(plan.blocks)
        for block, owner, shadows in zip(
            blocks, plan.owners[index], plan.shadows[index], strict=True
        )
    )


def _spread(median: float, ends: Sequence[float]) -> str:
    return f"{median:.2f} s ({ends[0]:.2f}..{ends[1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=None)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    began = time.perf_counter()
    plan = first_plan()
    first_s = time.perf_counter() - began
    blocks = sum(map(len, plan.blocks))
    held = held_blocks(plan, plan.stage_replicas.ranks)
    rows = []
    for name, lost in (("one rank", {12_345}), ("one node", set(range(40_000, 40_000 + NODE)))):
        living = tuple(rank for rank in plan.stage_replicas.ranks if rank not in lost)
        again = replace(roster(plan.stage_replicas.ranks), fresh=frozenset(lost))
        times, joined = [], []
        for _ in range(given.repetitions):
            began = time.perf_counter()
            after = next_plan(
                plan,
                roster(living),
                filled=True,
                generation=1,
                redundancy=1,
                move_layers=False,
            )
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            next_plan(after, again, filled=True, generation=2, redundancy=1)
            joined.append(time.perf_counter() - began)
        began = time.perf_counter()
        needed = held_blocks(after, after.stage_replicas.ranks)
        survivors = {rank: keys for rank, keys in held.items() if rank not in lost}
        nodes = {rank: f"node{rank // NODE}" for rank in plan.stage_replicas.ranks}
        block_transfers = plan_block_transfers(plan, survivors, needed, nodes)
        transfers_s = time.perf_counter() - began
        moved = sum(size for transfer in block_transfers for size in transfer.sizes)
        bound = least_elements(plan, lost)
        rows.append(
            {
                "lost": name,
                "replan_s": statistics.median(times),
                "replan_spread_s": [min(times), max(times)],
                "join_s": statistics.median(joined),
                "join_spread_s": [min(joined), max(joined)],
                "transfers_s": transfers_s,
                "moved_elements": moved,
                "lower_bound_elements": bound,
            }
        )
    table = Table(title=f"{RANKS:,} ranks, {blocks:,} blocks; the first plan took {first_s:.1f} s")
    for head in (
        "lost",
        "replan",
        "a replacement joins",
        "the block transfers",
        "state moved / lower bound",
    ):
        table.add_column(head)
    for row in rows:
        table.add_row(
            row["lost"],
            _spread(row["replan_s"], row["replan_spread_s"]),
            _spread(row["join_s"], row["join_spread_s"]),
            f"{row['transfers_s']:.2f} s",
            f"{row['moved_elements'] / row['lower_bound_elements']:.3f}",
        )
    Console().print(table)
    if given.json:
        found = {"ranks": RANKS, "blocks": blocks, "first_plan_s": first_s, "losses": rows}
        Path(given.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
