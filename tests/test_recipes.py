"""Recipes: each has the published model, fits its GPUs, and computes what one process computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.trainer.check import tiny_config
from holdfast.trainer.config import RunConfig, load_config
from holdfast.trainer.plan_report import plan_report
from holdfast.trainer.plan_report.report import PlanReport
from support.processes.cluster import Cluster
from support.runs.small_runs import findings_of

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.toml"))
PARAMETERS = {
    "deepseek-v3": 671_026_419_200 + 11_610_068_224,
    "gpt2-124m": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
}
"""Of the published weights, a tied one counted once, and those of DeepSeek-V3's layer for second
tokens beside the model's."""
MOST_BYTES = 70 * 2**30
"""Of the 80 GB of an H100; the rest is for CUDA, NCCL and fragments."""
OF_A_LAYOUT = {"parallel": None, "checkpoint": None, "elastic": None}
OF_A_LAYOUT |= {"train": {"recompute", "activation_gib"}, "optimizer": {"state"}}
OF_A_LAYOUT |= {"numerics": {"reduction"}}
"""By section, the keys in which the recipes of one model may differ; None: all."""
WITHOUT_SHADOWS = ["elastic.enabled=false"]


def _of(path: Path) -> tuple[str, int]:
    """The model of a recipe, and its GPUs."""
    found = re.fullmatch(r"(.+)-(\d+)gpu", path.stem)
    assert found is not None, path
    return found[1], int(found[2])


def _fullest_bytes(report: PlanReport) -> int:
    return max(memory.total for memory in report.memory)


def _rows() -> list[tuple[str, str, str]]:
    """The rows of the page's table: recipe, layout, GiB."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    return re.findall(r"^\| `(\S+)` \| ([^|]+?) \| (\d+) \|", page, re.MULTILINE)


def test_every_model_has_a_recipe_and_every_recipe_a_row() -> None:
    assert {_of(path)[0] for path in RECIPES} == PARAMETERS.keys()
    assert sorted(name for name, _, _ in _rows()) == [path.name for path in RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_published_model_and_fits_its_gpus(path: Path) -> None:
    model, gpus = _of(path)
    # Where shadows would lie has no part in what is asked here, and takes most of the time of a
    # plan: the recipes of one model are planned with it.
    overrides = [] if model == "llama3-8b" else WITHOUT_SHADOWS
    config = load_config(path, overrides)
    report = plan_report(config)
    assert config.parallel.ranks == gpus
    assert report.parameters == PARAMETERS[model]
    assert _fullest_bytes(report) <= MOST_BYTES
    [(layout, planned)] = [(layout, gib) for name, layout, gib in _rows() if name == path.name]
    axes = {name: str(size) for name, size in report.as_dict()["mesh"].items() if size > 1}
    assert layout == " x ".join(f"{name} {size}" for name, size in axes.items())
    assert int(planned) == round(_fullest_bytes(report) / 2**30)


def test_seventy_billion_parameters_do_not_fit_a_node() -> None:
    leanest = {"tensor": 8, "pipeline": 1, "data": 1}
    overrides = [f"parallel.{axis}={size}" for axis, size in leanest.items()]
    overrides += ["optimizer.state=host", "numerics.reduction=fast", "train.recompute=full"]
    overrides += WITHOUT_SHADOWS
    config = load_config(ROOT / "examples/recipes/llama3-70b-64gpu.toml", overrides)
    assert _fullest_bytes(plan_report(config)) > MOST_BYTES


def _without_layout(config: RunConfig) -> dict[str, Any]:
    told = msgspec.to_builtins(config)
    for section, keys in OF_A_LAYOUT.items():
        for key in told[section] if keys is None else keys:
            told[section] = {k: v for k, v in told[section].items() if k != key}
    return told


@pytest.mark.parametrize("model", PARAMETERS)
def test_recipes_of_a_model_differ_in_their_layouts_alone(model: str) -> None:
    first, *others = [load_config(path) for path in RECIPES if _of(path)[0] == model]
    assert others or model == "deepseek-v3"
    for other in others:
        assert _without_layout(other) == _without_layout(first)
        assert other.parallel.tensor == first.parallel.tensor, "it would change the bits"


def _on_few_ranks(config: RunConfig) -> RunConfig:
    """The recipe with two ranks along its axes, at most four in all, and two micro-batches."""
    given = config.parallel
    tensor, pipeline = min(given.tensor, 2), min(given.pipeline, 2)
    data = min(given.data, 4 // (tensor * pipeline), 2)
    parallel = msgspec.structs.replace(
        given,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        virtual=min(given.virtual, 2),
        blocks_per_chunk=[],
        shard_group=min(given.shard_group, data),
    )
    train = msgspec.structs.replace(config.train, global_batch=2 * config.train.micro_batch)
    few = tiny_config(msgspec.structs.replace(config, parallel=parallel, train=train), 2)
    # What is recomputed is chosen by memory, which a tiny model has.
    how = "full" if config.train.recompute == "auto" else config.train.recompute
    return msgspec.structs.replace(few, train=msgspec.structs.replace(few.train, recompute=how))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("model", PARAMETERS)
def test_tiny_recipes_of_a_model_equal_autograd(cluster: Cluster, model: str) -> None:
    few = [_on_few_ranks(load_config(path)) for path in RECIPES if _of(path)[0] == model]
    first, *_ = few
    # Saving and losses have no part in it, so some are the same.
    alike = {"checkpoint": first.checkpoint, "elastic": first.elastic}
    few = [msgspec.structs.replace(config, **alike) for config in few]
    for config in {msgspec.json.encode(config): config for config in few}.values():
        assert findings_of(cluster, config) == []
