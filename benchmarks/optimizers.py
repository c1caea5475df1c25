"""How many steps each optimizer takes to AdamW's loss: python benchmarks/optimizers.py

The model, data and batches of examples/tiny.toml on one rank, with the same schedule for all. Each
optimizer gets the best of some learning rates on the first seed; then every seed is trained with
it. The loss is that of held-out text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from harness import machine
from text_runs import arguments, held_out_losses

RATES = {name: (3e-3, 1e-2, 2e-2) for name in ("adamw", "muon")}
BASE = "adamw"


def losses(name: str, rate: float, seed: int, steps: int, every: int) -> dict[int, float]:
    """The held-out loss of one run, by step."""
    return held_out_losses({"optimizer.name": name}, rate, seed, steps, every)


def reached(found: Mapping[int, float], loss: float) -> int | None:
    """The first step at which a loss is reached."""
    return next((step for step, value in found.items() if value <= loss), None)


def main() -> None:
    given = arguments(__doc__, steps=150, every=10)
    size = (given.steps, given.every)
    tried = {
        name: {rate: losses(name, rate, given.seeds[0], *size) for rate in given.rates or usual}
        for name, usual in RATES.items()
    }
    best = {
        name: min(of_rate, key=lambda rate: of_rate[rate][given.steps])
        for name, of_rate in tried.items()
    }
    runs = {
        name: {
            seed: tried[name][rate] if seed == given.seeds[0] else losses(name, rate, seed, *size)
            for seed in given.seeds
        }
        for name, rate in best.items()
    }
    table = Table(title=f"{given.steps} steps, seeds {given.seeds}")
    for column in ("optimizer", "rate", "held-out loss at the end", "steps to AdamW's"):
        table.add_column(column)
    result = {}
    for name, of_seed in runs.items():
        ends = [found[given.steps] for found in of_seed.values()]
        steps = [reached(found, runs[BASE][seed][given.steps]) for seed, found in of_seed.items()]
        spread = f" +- {stdev(ends):.4f}" if len(ends) > 1 else ""
        shown = f"{mean(ends):.4f}{spread}"
        table.add_row(name, f"{best[name]:g}", shown, ", ".join(map(str, steps)))
        result[name] = {"rate": best[name], "ends": ends, "steps": steps}
    at_rates = {
        name: {rate: found[given.steps] for rate, found in of_rate.items()}
        for name, of_rate in tried.items()
    }
    Console().print(table)
    Console().print(at_rates)
    if given.json is not None:
        content = {"machine": machine(), "rates": at_rates, "results": result}
        given.json.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
