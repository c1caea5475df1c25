"""The optimizer state of mp_rank folders, against what Megatron's optimizers hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.checkpoint import load
from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.checkpoint.tools.verify import verify_checkpoint
from support.foreign.conversions import converted
from support.foreign.megatron_jobs import ITERATION
from support.foreign.megatron_shards import by_stage, gpt2_weights, huggingface_weights
from support.foreign.megatron_training import SCHEDULE, STEPS, Training
from support.processes.cluster import Cluster

pytestmark = [pytest.mark.mp, pytest.mark.slow]
FILE = f"iter_{ITERATION:07d}/mp_rank_01_001/model_optim_rng.pt"
KINDS = {
    "plain": Training(),
    "halves": Training(half=True, tie=True),
    "virtual": Training(half=True, tie=True, virtual=2),
    "gpt2": Training(gpt2=True, tie=True, half=True),
    "norms": Training(query_key_norms=True),
    "decoupled": Training(decoupled=True),
    "experts": Training(experts=4),
}


Trained = tuple[Training, Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trainings(
    megatron_pool: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """Each kind is trained once."""
    root = tmp_path_factory.mktemp("megatron")
    done: dict[str, list[dict[str, Any]]] = {}

    def trained(kind: str) -> Trained:
        if kind not in done:
            job = "support.foreign.megatron_training:train"
            done[kind] = megatron_pool.run(job, 4, how=KINDS[kind], folder=str(root / kind))
        return KINDS[kind], root / kind, done[kind]

    return trained


def expected_of(how: Training, shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights, moments and master copies of all ranks, under holdfast's names."""
    found = {}
    for kind in ("weights", "exp_avg", "exp_avg_sq", *(["master"] if how.half else [])):
        stages = by_stage(shards, kind)
        whole = gpt2_weights(stages) if how.gpt2 else huggingface_weights(stages)
        prefix = "" if kind == "weights" else f"{kind}."
        found |= {prefix + name: value for name, value in whole.items()}
    return found


def assert_holds(folder: Path, expected: dict[str, Tensor]) -> None:
    assert read_manifest(folder).tensors.keys() == expected.keys()
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load(folder, found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_what_the_optimizer_holds_for_the_parameter(
    trainings: Callable[[str], Trained], tmp_path: Path, kind: str
) -> None:
    how, folder, shards = trainings(kind)
    done = converted(folder, tmp_path / "ours", "holdfast")
    assert done.left_out == {}
    assert verify_checkpoint(tmp_path / "ours") == []
    assert_holds(tmp_path / "ours", expected_of(how, shards))
    scalars = read_manifest(tmp_path / "ours").scalars
    assert scalars["optimizer_step"] == STEPS
    assert scalars["megatron"]["opt_param_scheduler"] == SCHEDULE
    assert scalars["megatron"]["param_groups"][0]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("kind", "virtual"),
    [
        ("plain", 1),
        ("plain", 2),
        ("halves", 2),
        ("virtual", 1),
        ("gpt2", 1),
        ("norms", 1),
        ("experts", 1),
    ],
)
def test_megatron_goes_on_as_if_nothing_had_been(
    megatron_pool: Cluster,
    trainings: Callable[[str], Trained],
    tmp_path: Path,
    kind: str,
    virtual: int,
) -> None:
    how, folder, before = trainings(kind)
    converted(folder, tmp_path / "ours", "holdfast")
    ranks = {"tensor": 2, "pipeline": 2, "virtual": virtual}
    values = {**ranks, "vocab_multiple": 8, "transformer_engine": 0}
    converted(tmp_path / "ours", tmp_path / "back", "megatron-legacy", values=values)
    tracker = tmp_path / "back/latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(ITERATION)
    after = megatron_pool.run(
        "support.foreign.megatron_training:resume",
        4,
        how=replace(how, virtual=virtual),
        folder=str(tmp_path / f"back/iter_{ITERATION:07d}"),
    )
    assert_went_on(after, before)


@pytest.mark.parametrize("kind", ["plain", "halves"])
def test_megatron_goes_on_in_torch_dist_without_the_distributed_optimizer(
    megatron_pool: Cluster, trainings: Callable[[str], Trained], tmp_path: Path, kind: str
) -> None:
    how, folder, before = trainings(kind)
    values = {"vocab_multiple": 16, "distributed_optimizer": 0, "transformer_engine": 0}
    converted(folder, tmp_path / "dist", "megatron", values=values)
    place = str(tmp_path / f"dist/iter_{ITERATION:07d}")
    after = megatron_pool.run(
        "support.foreign.megatron_training:resume_dist", 4, how=how, folder=place
    )
    assert_went_on(after, before)
    # And from there into files of ranks, as if there had been nothing between.
    ranks = {"tensor": 2, "pipeline": 2, "vocab_multiple": 8, "transformer_engine": 0}
    for source, name in ((folder, "direct"), (tmp_path / "dist", "around")):
        converted(source, tmp_path / name, "megatron-legacy", values=ranks)
    direct, around = (
        torch.load(tmp_path / name / FILE, weights_only=False)["optimizer"]
        for name in ("direct", "around")
    )
    inner = [(kept["optimizer"] if how.half else kept) for kept in (direct, around)]
    assert inner[0]["param_groups"] == inner[1]["param_groups"]
    states = [state for kept in inner for state in kept["state"].values()]
    assert all(state["step"] == STEPS for state in states)


def assert_went_on(after: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    assert all(shard["iteration"] == ITERATION for shard in after)
    for what in ("weights", "exp_avg", "exp_avg_sq", "master", "next"):
        found, expected = by_parameter(after, what), by_parameter(before, what)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (what, name)


def by_parameter(shards: list[dict[str, Any]], kind: str) -> dict[tuple[int, str], Tensor]:
    """By tensor-parallel rank and name across all stages."""
    return {(shard["tp"], name): value for shard in shards for name, value in shard[kind].items()}


@pytest.mark.parametrize("kind", ["plain", "halves"])
def test_the_files_come_back(
    trainings: Callable[[str], Trained], tmp_path: Path, kind: str
) -> None:
    _, folder, _ = trainings(kind)
    values = {"tensor": 2, "pipeline": 2, "vocab_multiple": 8, "transformer_engine": 0}
    converted(folder, tmp_path / "ours", "holdfast")
    converted(tmp_path / "ours", tmp_path / "back", "megatron-legacy", values=values)
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        name = f"iter_{ITERATION:07d}/mp_rank_{rank}/model_optim_rng.pt"
        first = torch.load(folder / name, weights_only=False)
        second = torch.load(tmp_path / "back" / name, weights_only=False)
        assert [n for n in first["model"] if "_extra" not in n] == list(second["model"])
        assert first["opt_param_scheduler"] == second["opt_param_scheduler"]
        theirs, ours = first["optimizer"], second["optimizer"]
        if kind == "halves":
            masters = (
                [master for group in side["fp32_from_fp16_params"] for master in group]
                for side in (theirs, ours)
            )
            assert_all_equal(*masters)
            theirs, ours = theirs["optimizer"], ours["optimizer"]
        assert list(theirs["state"]) == list(ours["state"])
        for what in ("exp_avg", "exp_avg_sq", "step"):
            kept = (
                [torch.as_tensor(state[what]) for state in side["state"].values()]
                for side in (theirs, ours)
            )
            assert_all_equal(*kept)
        for group, own in zip(theirs["param_groups"], ours["param_groups"], strict=True):
            assert group.items() <= own.items()


def assert_all_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_placed_is_left_out_and_says_why(
    trainings: Callable[[str], Trained], tmp_path: Path
) -> None:
    _, folder, shards = trainings("halves")
    weights = expected_of(replace(KINDS["halves"], half=False), shards)
    weights = {name: value for name, value in weights.items() if not name.startswith("exp_avg")}

    def reason(change: Callable[[dict[str, Any]], None]) -> str:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(folder, tmp_path / "theirs")
        content = torch.load(tmp_path / "theirs" / FILE, weights_only=False)
        change(content["optimizer"])
        torch.save(content, tmp_path / "theirs" / FILE)
        done = converted(tmp_path / "theirs", tmp_path / "ours", "holdfast")
        assert_holds(tmp_path / "ours", weights)
        assert list(done.left_out) == ["optimizer"]
        return done.left_out["optimizer"]

    def fewer(kept: dict[str, Any]) -> None:
        kept["optimizer"]["param_groups"][1]["params"].pop()

    def turned(kept: dict[str, Any]) -> None:
        state = kept["optimizer"]["state"][2]
        state["exp_avg_sq"] = state["exp_avg_sq"].T.contiguous()

    def one_master(kept: dict[str, Any]) -> None:
        kept["fp32_from_fp16_params"][0].pop()

    def swapped(kept: dict[str, Any]) -> None:
        first, second = kept["optimizer"]["param_groups"]
        first["wd_mult"], second["wd_mult"] = second["wd_mult"], first["wd_mult"]

    def unsaid(kept: dict[str, Any]) -> None:
        del kept["optimizer"]["param_groups"][0]["wd_mult"]

    def ahead(kept: dict[str, Any]) -> None:
        kept["optimizer"]["state"][0]["step"] += 1

    def untouched(kept: dict[str, Any]) -> None:
        del kept["optimizer"]["state"][1]

    def distributed(kept: dict[str, Any]) -> None:
        del kept["optimizer"]["state"], kept["fp32_from_fp16_params"]

    assert "group 1 (wd_mult 0.0) has 4 parameters, and the model has 5" in reason(fewer)
    why = reason(turned)
    assert "mp_rank_01_001/model_optim_rng.pt: the exp_avg_sq in group 0" in why
    assert "has shape [" in why
    assert "8 master copies, and the model 9 of its parameters in 16 bits" in reason(one_master)
    assert "group 0 (wd_mult 0.0) has 9 parameters, and the model has 5" in reason(swapped)
    assert "group 0 does not say wd_mult" in reason(unsaid)
    assert "different numbers of steps (3 and 4)" in reason(ahead)
    assert "there is no exp_avg in group 0 (wd_mult 1.0) in the place of" in reason(untouched)
    assert "keeps its states by buckets, in distrib_optim.pt" in reason(distributed)
