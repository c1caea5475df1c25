"""Going on from a checkpoint, in the same or another layout, gives the run that never stopped."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import Store

from holdfast.trainer.config import RunConfig, convert_config
from support.processes.cluster import Cluster, WorkerFailed
from support.runs.small_runs import events_of, make_config, metrics_of, run_in, world_size_of

STEPS = 10


def _config(**sections: dict[str, Any]) -> RunConfig:
    train = {"steps": STEPS, **sections.pop("train", {})}
    checkpoint = {"every": 3, **sections.pop("checkpoint", {})}
    return make_config(train=train, checkpoint=checkpoint, **sections)


def _exact(root: Path) -> tuple[list[str], list[str], str]:
    lines = metrics_of(root)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    [finished] = events_of(root, "run_finished")
    return (
        [line["loss_hex"] for line in lines],
        [line["grad_norm_hex"] for line in lines],
        finished["parameter_digest"],
    )


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("undisturbed")
    run_in(cluster, _config(), root)
    return _exact(root)


LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2 x pipeline 2": {"data": 2, "pipeline": 2},
    "interleaved": {"data": 2, "pipeline": 2, "virtual": 3, "schedule": "interleaved-1f1b"},
    "pipeline 3": {"pipeline": 3, "schedule": "zb-h1"},
    "data 3": {"data": 3},
    "zb-v": {"data": 2, "pipeline": 3, "virtual": 2, "schedule": "zb-v"},
    "parameters over 4": {"data": 4, "shard": "parameters"},
    "parameters in groups": {"data": 4, "shard": "parameters", "shard_group": 2},
    "gradients over stages": {"data": 2, "pipeline": 2, "shard": "gradients"},
    "one": {},
}


CHAIN = (
    "interleaved",
    "pipeline 3",
    "data 3",
    "parameters over 4",
    "gradients over stages",
    "parameters in groups",
    "data 2 x pipeline 2",
    "one",
    "zb-v",
    "data 2 x pipeline 2",
)
"""The layouts of a run that is stopped after each step, and goes on in the next of them."""


@pytest.mark.mp
@pytest.mark.slow
def test_experts_go_on_on_other_ranks_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    """Their optimizer's state is saved and read like that of all else."""
    sections: dict[str, Any] = {
        "model": {"family": "qwen3_moe", "layers": 2, "experts": 4, "expert_intermediate": 16},
        "numerics": {"tensor_shards": 2},
    }
    train = {"steps": 5, "global_batch": 6}
    run_in(cluster, _config(**sections, train=train), tmp_path / "undisturbed")
    wide = {"tensor": 2, "data": 2}
    stopped = _config(**sections, train={**train, "stop_after": 2}, parallel=wide)
    run_in(cluster, stopped, tmp_path / "run")
    then = _config(**sections, train=train, parallel={"data": 3, "shard": "parameters"})
    run_in(cluster, then, tmp_path / "run")
    assert _exact(tmp_path / "run") == _exact(tmp_path / "undisturbed")


@pytest.mark.mp
def test_a_stopped_run_goes_on_with_the_same_bits_in_any_layout(
    cluster: Cluster, tmp_path: Path, undisturbed: Any
) -> None:
    """What one layout saved wrongly, or the next read wrongly, is seen in the step after it."""
    for step, name in enumerate(CHAIN, start=1):
        train = {"stop_after": step} if step < STEPS else {}
        run_in(cluster, _config(parallel=LAYOUTS[name], train=train), tmp_path)
        losses = [line["loss_hex"] for line in metrics_of(tmp_path)]
        assert losses == undisturbed[0][:step], name
    assert _exact(tmp_path) == undisturbed
    assert [event["step"] for event in events_of(tmp_path, "resumed")] == list(range(1, STEPS))


KILLS = 3
SEEDS = range(10) if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else range(1)


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_again_and_again_goes_on_with_the_same_bits(
    cluster: Cluster, tmp_path: Path, undisturbed: Any, seed: int
) -> None:
    """A random rank of a random layout is killed in a random step, another layout goes on and is
    killed as well, and so on.
    """
    chance = random.Random(seed)
    names = chance.sample(sorted(LAYOUTS), KILLS + 1)
    steps = sorted(chance.sample(range(2, STEPS), KILLS))
    for name, step in zip(names, steps, strict=False):
        config = _config(parallel=LAYOUTS[name])
        kill = chance.randrange(world_size_of(config)), step
        with pytest.raises(WorkerFailed):
            run_in(cluster, config, tmp_path, kill=kill)
        assert len(metrics_of(tmp_path)) <= step
    run_in(cluster, _config(parallel=LAYOUTS[names[-1]]), tmp_path)
    assert _exact(tmp_path) == undisturbed


@pytest.mark.mp
def test_bf16_with_tied_embeddings_goes_on_with_the_same_bits(
    cluster: Cluster, tmp_path: Path
) -> None:
    model = {"tie_embeddings": True, "layers": 3}
    train = {"precision": "bf16", "steps": 4, "global_batch": 4}
    run_in(cluster, _config(model=model, train=train), tmp_path / "a")
    for stop, parallel in (
        ({"stop_after": 2}, {"pipeline": 3}),
        ({"stop_after": 3}, {"data": 2, "shard": "parameters"}),
        ({}, {"data": 2}),
    ):
        config = _config(model=model, train=train | stop, parallel=parallel)
        run_in(cluster, config, tmp_path / "b")
    assert _exact(tmp_path / "b") == _exact(tmp_path / "a")


@pytest.mark.mp
def test_each_sample_is_seen_once_over_changes_of_data_parallelism(
    cluster: Cluster, tmp_path: Path
) -> None:
    """data 3, then 2, then 3: what the replicas read, put together, is every sample once."""
    seen: list[int] = []
    for stop, data in ((2, 3), (5, 2), (6, 3)):
        train = {"steps": 6, "stop_after": stop}
        config = _config(model={"layers": 1}, train=train, parallel={"data": data})
        rows = cluster.run(
            f"{__name__}:train_and_list_samples",
            data,
            config=msgspec.to_builtins(config),
            root=str(tmp_path),
        )
        seen += [index for found in rows for index in found]
    assert sorted(seen) == list(range(6 * 12))


def train_and_list_samples(
    rank: int, world_size: int, store: Store, *, config: dict, root: str
) -> list[int]:
    """Train and return the global indices of the samples that this rank has computed."""
    from holdfast.parallel.pipeline import Passage
    from holdfast.trainer.step.micro_batches.contexts import MicroBatches
    from support.runs import small_runs

    seen: set[int] = set()
    context = MicroBatches.context

    def noted(self: MicroBatches, passage: Passage) -> Any:
        if self.training:
            size, batch = self._config.train.micro_batch, self._config.train.global_batch
            first = self.step * batch + passage.micro_batch * size
            seen.update(range(first, first + size))
        return context(self, passage)

    MicroBatches.context = noted  # type: ignore[method-assign]
    try:
        small_runs.train_in(rank, world_size, store, config=config, root=root)
    finally:
        MicroBatches.context = context  # type: ignore[method-assign]
    return sorted(seen)


def save_and_load_elsewhere(
    rank: int, world_size: int, store: Store, *, config: dict, root: str, resume: str
) -> dict[str, str]:
    """Resume and do nothing else: a digest of every saved tensor's boxes on this rank."""
    import hashlib

    from holdfast.trainer.run.resume import Resume
    from holdfast.trainer.run.run_directory import RunDirectory
    from holdfast.trainer.run.signals import Signals
    from holdfast.trainer.saves import Checkpoints
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    world = local_world(rank, world_size)
    training = open_training(run_config, world, store)
    run = RunDirectory(Path(root), Resume((resume,)))
    checkpoints = Checkpoints(training, world, store, run, ("here",) * world_size, Signals())
    step = checkpoints.resume(lambda note: None)
    digests = {}
    for name, targets in training.state().targets().items():
        for target in targets:
            raw = target.memory.contiguous().view(-1).numpy().tobytes()
            digests[f"{name} {target.box}"] = hashlib.sha256(raw).hexdigest()
    checkpoints.save(step + 1)
    results = checkpoints.finish()
    assert not any(result.error for result in results), results
    checkpoints.close()
    return digests


@pytest.mark.mp
@pytest.mark.parametrize("tie", [False, True])
def test_parameters_and_moments_are_bit_equal_over_tensor_degrees(
    cluster: Cluster, tmp_path: Path, tie: bool
) -> None:
    """Saved with tensor 2, loaded with 4 x pipeline 2, saved again, loaded with 1: the same."""
    import safetensors.torch
    import torch

    model = {"heads": 4, "kv_heads": 4, "tie_embeddings": tie, "layers": 2}
    train = {"steps": 3, "global_batch": 2}
    start = _config(model=model, train=train, parallel={"tensor": 2, "data": 2})
    run_in(cluster, start, tmp_path / "first")
    source = tmp_path / "first/checkpoints/step-00000003"
    wide = _config(model=model, train=train, parallel={"tensor": 4, "pipeline": 2})
    for config, root, place in (
        (wide, tmp_path / "second", source),
        (_config(model=model, train=train), tmp_path / "third", None),
    ):
        cluster.run(
            f"{__name__}:save_and_load_elsewhere",
            world_size_of(config),
            config=msgspec.to_builtins(config),
            root=str(root),
            resume=str(place or tmp_path / "second/checkpoints/step-00000004"),
        )

    def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
        from holdfast.checkpoint.stores.registry import read_manifest

        manifest = read_manifest(folder)
        whole = {n: torch.empty(t.shape) for n, t in manifest.tensors.items()}
        for file, entry in manifest.files.items():
            if not entry.header_bytes:
                continue
            raw = (folder / file).read_bytes()
            for name, pieces in entry.pieces.items():
                for piece in pieces:
                    part = torch.frombuffer(
                        bytearray(raw[piece.offset : piece.offset + piece.length]),
                        dtype=torch.float32,
                    )
                    whole[name][piece.box.slices] = part.view(piece.box.shape)
        return whole

    first = tensors_of(source)
    for folder in ("second/checkpoints/step-00000004", "third/checkpoints/step-00000005"):
        again = tensors_of(tmp_path / folder)
        assert again.keys() == first.keys()
        for name, values in first.items():
            assert torch.equal(values, again[name]), (folder, name)
    # safetensors' own reader sees the same weights as our manifest.
    files = sorted((tmp_path / "third/checkpoints/step-00000005").glob("model-*"))
    read = {k: v for file in files for k, v in safetensors.torch.load_file(file).items()}
    assert all(torch.equal(values, first[name]) for name, values in read.items())


def train_or_tell(
    rank: int, world_size: int, store: Store, *, config: dict, root: str, **arguments: Any
) -> str:
    """Train as `run_in` does. Returns the error, which does not cost the pool, or nothing."""
    from holdfast.parallel.errors import HoldfastError
    from support.runs import small_runs

    try:
        small_runs.train_in(rank, world_size, store, config=config, root=root, **arguments)
    except HoldfastError as error:
        return str(error)
    return ""


@pytest.mark.mp
def test_what_cannot_be_resumed_is_refused_with_its_keys(cluster: Cluster, tmp_path: Path) -> None:
    def told(config: RunConfig, *allow_change: str) -> str:
        job = f"{__name__}:train_or_tell"
        plain, root = msgspec.to_builtins(config), str(tmp_path)
        [text] = cluster.run(job, 1, config=plain, root=root, allow_change=allow_change)
        return text

    def small(steps: int, **model: Any) -> RunConfig:
        train = {"steps": steps, "global_batch": 2, "seed": 5 if model else 0}
        return _config(train=train, model={"layers": 1, **model})

    assert told(small(2)) == ""
    changed = small(4, dropout=0.2)
    assert re.search(r"model.dropout = 0.2 .* train.seed = 5", told(changed))
    refused = told(changed, "train.seed")
    assert re.search(r"go on all the same with .*model.dropout,train.seed", refused)
    assert told(changed, "train.seed", "model.dropout") == ""
    assert len(metrics_of(tmp_path)) == 4
    notes = [event["message"] for event in events_of(tmp_path, "resume_note")]
    assert any("train.seed = 5" in note for note in notes)
    assert "has shape" in told(small(6, dropout=0.2, hidden=64), "model.hidden")


@pytest.mark.mp
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    cluster: Cluster, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"model": {"layers": 2}, "checkpoint": {"every": 2}}
    train = {"steps": 5, "global_batch": 4}
    run_in(cluster, _config(**sections, train=train), tmp_path / "a")
    run_in(cluster, _config(**sections, train={**train, "stop_after": 4}), tmp_path / "b")
    [file] = (tmp_path / "b/checkpoints/step-00000004").glob("optimizer-*")
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    run_in(cluster, _config(**sections, train=train, parallel={"data": 2}), tmp_path / "b")
    assert _exact(tmp_path / "b") == _exact(tmp_path / "a")
    [resumed] = events_of(tmp_path / "b", "resumed")
    assert resumed["step"] == 2
    passed_over, set_aside = events_of(tmp_path / "b", "resume_note")
    assert file.name in passed_over["message"]
    assert "exp_avg" in passed_over["message"]
    assert "superseded-step-00000004" in set_aside["message"]
    assert (tmp_path / "b/checkpoints/superseded-step-00000004").is_dir()
