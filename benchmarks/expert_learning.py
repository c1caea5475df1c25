"""Held-out loss of experts and of dense layers of equal work: python benchmarks/expert_learning.py

The text, batches and schedule of examples/tiny.toml on one rank, and a model that is small for the
8 million tokens of a run: experts add capacity, which a model that sees few tokens for each of its
parameters does not lack. A token's experts have together the width of the dense MLP, less what the
router costs, so a step of either does as many operations. Each contestant gets the best of some
learning rates on the first seed; then every seed is trained with it.
"""

from __future__ import annotations

import json
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from harness import machine
from holdfast.trainer.config import load_config
from holdfast.trainer.models import layer_specs
from text_runs import ONE_RANK, ROOT, arguments, held_out_losses

SMALL: dict[str, object] = {
    "model.layers": 2,
    "model.hidden": 64,
    "model.intermediate": 128,
    "model.heads": 4,
    "model.kv_heads": 2,
    "train.micro_batch": 16,
    "numerics.reduction": "fast",
}
DENSE: dict[str, object] = SMALL | {"model.family": "mistral"}
EXPERTS: dict[str, object] = SMALL | {
    "model.family": "mixtral",
    "model.experts": 8,
    "model.experts_per_token": 2,
    "model.router_aux_loss_coef": 0.01,
}
RATES = (1e-3, 3e-3, 1e-2)


def work(keys: dict[str, object]) -> tuple[float, int]:
    """The operations of a forward pass of a micro-batch, and the model's parameters."""
    sets = [f"{key}={value}" for key, value in (ONE_RANK | keys).items()]
    config = load_config(ROOT / "examples/tiny.toml", sets)
    train = config.train
    layers = layer_specs(
        config.model,
        tensor=1,
        sequence_parallel=False,
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        precision=train.precision,
        recompute="none",
    )
    rows = [row for layer in layers for row in layer.parameters[0] if row.tied_use == 0]
    return sum(layer.forward_flops for layer in layers), sum(row.elements for row in rows)


def contestants() -> dict[str, dict[str, object]]:
    """The keys of each; experts of the greatest width whose work is not more than the dense."""
    dense, _ = work(DENSE)
    width = next(
        width
        for width in range(1024, 0, -1)
        if work(EXPERTS | {"model.intermediate": width})[0] <= dense
    )
    return {"dense": DENSE, "experts": EXPERTS | {"model.intermediate": width}}


def main() -> None:
    given = arguments(__doc__, steps=4000, every=500)
    table = Table(title=f"{given.steps} steps, seeds {given.seeds}")
    columns = ("", "parameters", "operations", "rate", "held-out loss at the end", "by rate")
    for column in (*columns, "above dense, by seed"):
        table.add_column(column)
    result, dense_ends = {}, list[float]()
    for name, keys in contestants().items():
        size = (given.steps, given.every)
        rates = given.rates or RATES
        tried = {rate: held_out_losses(keys, rate, given.seeds[0], *size) for rate in rates}
        at_rates = {rate: found[given.steps] for rate, found in tried.items()}
        best = min(at_rates, key=at_rates.__getitem__)
        others = [held_out_losses(keys, best, seed, *size) for seed in given.seeds[1:]]
        ends = [at_rates[best], *(found[given.steps] for found in others)]
        dense_ends = dense_ends or ends
        spread = f" +- {stdev(ends):.4f}" if len(ends) > 1 else ""
        operations, parameters = work(keys)
        shown = {rate: round(loss, 4) for rate, loss in at_rates.items()}
        table.add_row(
            name,
            f"{parameters:,}",
            f"{operations:.4g}",
            f"{best:g}",
            f"{mean(ends):.4f}{spread}",
            str(shown),
            ", ".join(f"{loss - dense:+.4f}" for loss, dense in zip(ends, dense_ends, strict=True)),
        )
        result[name] = {"keys": keys, "operations": operations, "rates": at_rates, "ends": ends}
    Console().print(table)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "results": result}, indent=2))


if __name__ == "__main__":
    main()
