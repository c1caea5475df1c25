"""A layer's experts, forward and backward, beside transformers' implementations of the same layer.

Both have the same weights and tokens, and give the same output and gradients: this is checked
first. Contestants run in turn, in one process with one thread, and times are those of the
processor.

    python benchmarks/experts.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness import machine
from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import TensorParallel
from holdfast.trainer.models.decoder.experts import Experts
from holdfast.trainer.models.decoder.section import ExpertDesign, RouterDesign
from holdfast.trainer.models.qwen3_moe.family import Qwen3MoeConfig

SIZES = (
    {"hidden": 512, "intermediate": 384, "experts": 16, "per_token": 2, "tokens": 1024},
    {"hidden": 512, "intermediate": 192, "experts": 64, "per_token": 8, "tokens": 1024},
    {"hidden": 1024, "intermediate": 384, "experts": 128, "per_token": 8, "tokens": 2048},
)
"""Small ones, and one expert layer of the proportions of Qwen3-30B-A3B at half of its width."""
IMPLEMENTATIONS = ("grouped_mm", "eager")
Pass = Callable[[], tuple[Tensor, ...]]


def contestants(size: dict[str, int], dtype: torch.dtype) -> dict[str, Pass]:
    """The forward and backward pass of each contestant."""
    torch.manual_seed(1)
    value = torch.randn(size["tokens"], 1, size["hidden"]).to(dtype).requires_grad_()
    gradient = torch.randn_like(value)
    ours = _ours(size, dtype)
    found: dict[str, Pass] = {"holdfast": _pass(ours, value, gradient)}
    for name in IMPLEMENTATIONS:
        found[f"transformers {name}"] = _pass(_theirs(size, dtype, name, ours), value, gradient)
    mine, *others = (run() for run in found.values())
    for other in others:
        for one, two in zip(mine[:2], other[:2], strict=True):
            _check_alike(one, two, dtype)
    return found


def _check_alike(one: Tensor, two: Tensor, dtype: torch.dtype) -> None:
    """Of most tokens: transformers scores in bf16, where some of a token's 8 experts are others."""
    rows, expected = one.flatten(0, -2).float(), two.flatten(0, -2).float()
    differences = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    alike = differences < (0.01 if dtype.itemsize < 4 else 1e-3)
    share = float(alike.float().mean())
    assert share > (0.95 if dtype.itemsize < 4 else 0.999), (share, differences.quantile(0.5))


def _pass(layer: Any, value: Tensor, gradient: Tensor) -> Pass:
    learned = [value, *layer.parameters()]

    def run() -> tuple[Tensor, ...]:
        output = layer(value)
        return output.detach(), *torch.autograd.grad(output, learned, gradient)

    return run


class _Ours(torch.nn.Module):
    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        model = Qwen3MoeConfig(family="qwen3_moe", layers=1, hidden=size["hidden"], vocab=8)
        design = ExpertDesign(
            count=size["experts"],
            per_token=size["per_token"],
            intermediate=size["intermediate"],
            router=RouterDesign(aux_loss=0.0, z_loss=0.0),
        )
        tp = TensorParallel(None, False)
        self.layer = Experts(model, design, 1, tp, WeightGradientQueue(), range(design.count))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, value: Tensor) -> Tensor:
        return self.layer([value], MicroBatchContext(0, 0, True, None), [()], {})[0]


def _ours(size: dict[str, int], dtype: torch.dtype) -> _Ours:
    return _Ours(size).to(dtype)


def _theirs(size: dict[str, int], dtype: torch.dtype, name: str, ours: _Ours) -> Any:
    from transformers.models.qwen3_moe import Qwen3MoeConfig as Config
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Config(
        hidden_size=size["hidden"],
        moe_intermediate_size=size["intermediate"],
        num_experts=size["experts"],
        num_experts_per_tok=size["per_token"],
        norm_topk_prob=True,
    )
    config._experts_implementation = name
    block = Qwen3MoeSparseMoeBlock(config).to(dtype)
    experts: Any = ours.layer.experts.values()
    with torch.no_grad():
        block.gate.weight.copy_(ours.layer.router)
        block.experts.gate_up_proj.copy_(torch.stack([e.gate_up for e in experts]))
        block.experts.down_proj.copy_(torch.stack([e.down for e in experts]))
    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="ms of processor time, forward and backward; ratio to grouped_mm")
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            runs = contestants(size, dtype)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(1 + given.repetitions):
                for name, run in runs.items():
                    start = time.process_time()
                    run()
                    if number:
                        times[name].append((time.process_time() - start) * 1e3)
            rows.append({"dtype": str(dtype)[6:], **size, "times_ms": times})
            if not table.columns:
                for column in ("dtype", *size, *runs, "ratio"):
                    table.add_column(column)
            medians = {name: statistics.median(found) for name, found in times.items()}
            ratio = medians["holdfast"] / medians["transformers grouped_mm"]
            shown = [
                f"{m:.0f} ({min(times[n]):.0f}..{max(times[n]):.0f})" for n, m in medians.items()
            ]
            table.add_row(str(dtype)[6:], *map(str, size.values()), *shown, f"{ratio:.2f}")
    Console(width=150).print(table)
    if given.json:
        record = {"title": "Experts", "machine": machine(), "rows": rows}
        Path(given.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
