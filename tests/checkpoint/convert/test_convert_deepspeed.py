"""DeepSpeed's checkpoints of ZeRO 1 to 3 convert bit for bit, and DeepSpeed goes on from ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError
from support.foreign.conversions import converted, tensors_of
from support.foreign.deepspeed_jobs import ENVIRONMENT, IMPORTS
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_in

pytestmark = [pytest.mark.mp, pytest.mark.slow]

JOBS = "support.foreign.deepspeed_jobs"
# The first worker of each group in the pool: DeepSpeed keeps the first process group for ever.
TWO, TWO_MORE, THREE, FOUR, ALONE = 0, 2, 4, 7, 11
TAG = "global_step3"
CASES = [(1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]

OWN_TOO = [(1, "bf16"), (3, "bf16")]
"""Where what DeepSpeed's own converter makes is tried beside ours."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Cluster]:
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    workers = Cluster(ALONE + 1, imports=IMPORTS, environment=ENVIRONMENT)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def trained(
    pool: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, tuple[Path, list[float]]]:
    """By (stage, precision): where 2 ranks saved after 3 of 6 steps, and all losses."""
    root = tmp_path_factory.mktemp("deepspeed")
    cases = [
        {
            "stage": stage,
            "precision": precision,
            "steps": 6,
            "save_at": 3,
            "folder": str(root / f"{precision}-{stage}"),
        }
        for stage, precision in CASES
    ]
    results = pool.run(f"{JOBS}:run_deepspeed", 2, first_worker=TWO, cases=cases, timeout_s=110)[0]
    return {
        case: (Path(given["folder"]), result["losses"])
        for case, given, result in zip(CASES, cases, results, strict=True)
    }


def test_every_weight_equals_deepspeeds_own_consolidation(
    pool: Cluster, tmp_path: Path, trained: dict[Any, tuple[Path, list[float]]]
) -> None:
    folders = [str(folder) for folder, _ in trained.values()]
    [owns] = pool.run(f"{JOBS}:consolidate", 1, first_worker=ALONE, folders=folders, tag=TAG)
    for ((stage, precision), (folder, _)), own in zip(trained.items(), owns, strict=True):
        out = tmp_path / f"{precision}-{stage}"
        done = converted(folder, out, "holdfast")
        assert (done.source_format, done.step) == ("deepspeed", 3)
        assert verify_checkpoint(out) == []
        assert read_manifest(out).scalars["optimizer_step"] == 3
        found = tensors_of(out)
        prefix = "master." if precision == "bf16" else ""
        for name, value in own.items():
            ours = found[name if name == "scale" else prefix + name]
            assert torch.equal(ours, value.reshape(ours.shape)), (stage, precision, name)
            if precision == "bf16" and name != "scale":
                assert torch.equal(found[name], value.to(torch.bfloat16))
        assert sum(name.startswith("exp_avg_sq.") for name in found) == len(own) - 1


def make_universal(pool: Cluster, places: dict[Any, tuple[Path, Path]]) -> dict[Any, Path]:
    """What DeepSpeed's own converter makes of checkpoints: by key (source, target), the target."""
    pairs = [(str(source), str(target)) for source, target in places.values()]
    pool.run(f"{JOBS}:make_universal", 1, first_worker=ALONE, pairs=pairs)
    return {key: target for key, (_, target) in places.items()}


@pytest.fixture(scope="module")
def own_universal(
    pool: Cluster,
    trained: dict[Any, tuple[Path, list[float]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Any, Path]:
    """By case: DeepSpeed's own universal checkpoint."""
    root = tmp_path_factory.mktemp("universal")
    return make_universal(
        pool,
        {case: (trained[case][0] / TAG, root / f"own-{case[0]}-{case[1]}") for case in OWN_TOO},
    )


def test_tensor_parallel_ranks_are_put_together_as_deepspeed_does(
    pool: Cluster, tmp_path: Path
) -> None:
    stages = [1, 3]
    pool.run(f"{JOBS}:run_tensor_parallel", 4, first_worker=FOUR, stages=stages, root=str(tmp_path))
    places = {stage: tmp_path / f"tensor-{stage}" for stage in stages}
    owns = make_universal(pool, {s: (p / "global_step2", p / "own") for s, p in places.items()})
    for stage, place in places.items():
        own = owns[stage]
        converted(place, tmp_path / f"a-{stage}", "holdfast", source_format="deepspeed")
        converted(own, tmp_path / f"b-{stage}", "holdfast")
        ours, theirs = tensors_of(tmp_path / f"a-{stage}"), tensors_of(tmp_path / f"b-{stage}")
        assert ours["model.layers.0.self_attn.o_proj.weight"].shape == (32, 32)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_deepspeed_goes_on_from_ours_on_another_number_of_ranks(
    pool: Cluster,
    tmp_path: Path,
    trained: dict[Any, tuple[Path, list[float]]],
    own_universal: dict[Any, Path],
) -> None:
    cases: list[dict[str, Any]] = []
    for (stage, precision), (folder, _) in trained.items():
        place = tmp_path / f"{precision}-{stage}"
        common = {"stage": stage, "precision": precision, "steps": 6}
        converted(folder, place / "ours", "holdfast")
        converted(place / "ours", place / "through", "deepspeed-universal")
        cases.append({**common, "load": (str(place), "through")})
        if (stage, precision) in OWN_TOO:
            # Right after ours: DeepSpeed changes torch's functions for whatever comes later.
            own = own_universal[stage, precision]
            cases.append({**common, "load": (str(own.parent), own.name)})
    results = pool.run(f"{JOBS}:run_deepspeed", 3, first_worker=THREE, cases=cases, timeout_s=110)[
        0
    ]
    before: list[float] = []
    for case, result in zip(cases, results, strict=True):
        assert result["first"] == 3
        if case["load"][1] == "own":
            assert result["losses"] == before
        # Three ranks add gradients in another order than two.
        _, losses = trained[case["stage"], case["precision"]]
        torch.testing.assert_close(
            torch.tensor(result["losses"]),
            torch.tensor(losses[3:]),
            rtol=1e-5 if case["precision"] == "fp32" else 3e-2,
            atol=0,
        )
        before = result["losses"]


def test_the_same_number_of_ranks_gives_the_same_bits(
    pool: Cluster, tmp_path: Path, trained: dict[Any, tuple[Path, list[float]]]
) -> None:
    cases: list[dict[str, Any]] = []
    for (stage, precision), (folder, _) in trained.items():
        converted(folder / TAG, tmp_path / f"{precision}-{stage}", "deepspeed-universal")
        load_from = (str(tmp_path), f"{precision}-{stage}")
        cases.append({"stage": stage, "precision": precision, "steps": 6, "load": load_from})
    results = pool.run(
        f"{JOBS}:run_deepspeed", 2, first_worker=TWO_MORE, cases=cases, timeout_s=110
    )[0]
    for result, (_, losses) in zip(results, trained.values(), strict=True):
        assert result["losses"] == losses[3:]


def test_universal_checkpoints_of_deepspeed_are_read(
    tmp_path: Path,
    trained: dict[Any, tuple[Path, list[float]]],
    own_universal: dict[Any, Path],
) -> None:
    for (stage, precision), own in own_universal.items():
        folder, _ = trained[stage, precision]
        done = converted(own, tmp_path / f"a-{stage}", "holdfast")
        assert done.source_format == "deepspeed-universal"
        converted(folder, tmp_path / f"b-{stage}", "holdfast")
        a, b = tensors_of(tmp_path / f"a-{stage}"), tensors_of(tmp_path / f"b-{stage}")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_ours_goes_to_universal_and_back(cluster: Cluster, tmp_path: Path) -> None:
    config = make_config(
        train={"steps": 2, "precision": "bf16"}, checkpoint={"every": 2}, parallel={"data": 2}
    )
    run_in(cluster, config, tmp_path / "run")
    converted(tmp_path / "run", tmp_path / "universal", "deepspeed-universal")
    converted(tmp_path / "universal", tmp_path / "back", "holdfast")
    first = tensors_of(tmp_path / "run/checkpoints/step-00000002")
    again = tensors_of(tmp_path / "back")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    manifest = read_manifest(tmp_path / "back")
    assert (manifest.step, manifest.scalars["optimizer_step"]) == (2, 2)


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_what_is_missing_truncated_or_malicious_is_named(
    tmp_path: Path, trained: dict[Any, tuple[Path, list[float]]]
) -> None:
    folder, _ = trained[1, "bf16"]

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / TAG, tmp_path / name))

    partition = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    missing = copy("missing")
    (missing / partition).unlink()
    with pytest.raises(
        CheckpointError, match="data-parallel rank 1, tensor-parallel rank 0; it was saved by 2 x 1"
    ):
        converted(missing, tmp_path / "out", "holdfast")
    for name in (
        "layer_0_expert_1_mp_rank_00_model_states.pt",
        "expert_3_mp_rank_00_model_states.pt",
        "expp_rank_1_mp_rank_00_optim_states.pt",
    ):
        experts = copy(name)
        (experts / name).touch()
        with pytest.raises(ConfigError, match=f"experts in files of their own .{name}"):
            converted(experts, tmp_path / "out", "holdfast")
    short = copy("short")
    (short / partition).write_bytes((short / partition).read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=f"{partition} is truncated or damaged"):
        converted(short, tmp_path / "out", "holdfast")
    evil = copy("evil")
    marker = tmp_path / "executed"
    torch.save({"module": Malicious(f"touch {marker}")}, evil / "mp_rank_00_model_states.pt")
    with pytest.raises(
        CheckpointError, match=r"refused: its pickle asks for (posix|nt|os)\.system"
    ):
        converted(evil, tmp_path / "out", "holdfast")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [(2, "fp32"), (3, "bf16")])
def test_states_of_other_optimizers_are_read_under_their_own_names(
    tmp_path: Path, trained: dict[Any, tuple[Path, list[float]]], case: tuple[int, str]
) -> None:
    folder = shutil.copytree(trained[case][0] / TAG, tmp_path / "other")
    for file in folder.glob("*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        kept = content["optimizer_state_dict"]
        state = kept.get("base_optimizer_state") or kept["optimizer_state_dict"]
        for one in state["state"].values():
            one["momentum"], one["peak"] = one.pop("exp_avg"), one["exp_avg_sq"] + 1
            one["scale"] = torch.ones(())
        torch.save(content, file)
    converted(trained[case][0] / TAG, tmp_path / "adam", "holdfast")
    adam = tensors_of(tmp_path / "adam")
    done = converted(folder, tmp_path / "ours", "holdfast")
    assert list(done.left_out) == ["optimizer state scale"]
    found = tensors_of(tmp_path / "ours")
    expected = {n.replace("exp_avg.", "momentum."): value for n, value in adam.items()}
    expected |= {
        n.replace("exp_avg_sq.", "peak."): value + 1
        for n, value in adam.items()
        if n.startswith("exp_avg_sq.")
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
