"""A planted sample that makes a spike is found and named; the run ends as if it never had it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import Store

from holdfast.parallel.errors import ConfigError, DataError
from holdfast.trainer.config import Removal, RunConfig, convert_config, dump_toml, load_config
from holdfast.trainer.run import RunDirectory, find_resume
from holdfast.trainer.saves import take_back_stopped
from holdfast.trainer.saves.rewind.search import Part, suspects
from holdfast.trainer.step import open_split
from support.processes.cluster import Cluster
from support.runs.commands import holdfast
from support.runs.elastic_runs import Starter, bits_of as elastic_bits_of, fault
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

pytestmark = [pytest.mark.mp]

BATCH = 4
STEPS = 18
POISON = 115
"""The number of the planted document's line."""
DOCUMENTS = 128


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one sequence each, which are learnt soon, and one of random letters."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    draw = random.Random(1)
    texts = ["ab" * 8] * DOCUMENTS
    texts[POISON] = "".join(draw.choice("ZYXWVUTSRQPONMLK") for _ in range(16))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sections_of(corpus: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, dict[str, Any]] = {
        "model": {"layers": 2, "vocab": 257, "dropout": 0.0},
        "data": {
            **{"kind": "text", "path": [str(corpus)]},
            **{"packing": "best-fit", "eval_fraction": 0.0},
        },
        "train": {"steps": STEPS, "seq_len": 16, "global_batch": BATCH, "micro_batch": 2},
        "optimizer": {"lr": 3e-2, "schedule": "constant"},
        "numerics": {"spike_window": 4, "spike_sigmas": 6.0, "spike_action": "rewind"},
        "elastic": {"rewind": 3},
    }
    names = dict.fromkeys((*own, *sections))
    return {name: {**own.get(name, {}), **sections.get(name, {})} for name in names}


def config_of(corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    return make_config(**sections_of(corpus, **sections))


def poison_of(config: RunConfig) -> tuple[int, int]:
    """The number of the planted sample, and the step that reads it, counted from 0."""
    data = open_split(config, "train")
    for place in range(STEPS * BATCH):
        if bytes(data.sample(place).tokens[0, :4].tolist()).isupper():
            return data.numbers(place, 1)[0], place // BATCH
    raise AssertionError("no step reads it")


def train_in(cluster: Cluster, config: RunConfig, root: Path, **more: Any) -> None:
    plain = msgspec.to_builtins(config)
    job = "support.runs.small_runs:train_in"
    cluster.run(job, config.parallel.ranks, config=plain, root=str(root), **more)


def bits_of(root: Path) -> tuple[Any, ...]:
    """All that is to be equal: each step's numbers and digests with their chain, and the end."""
    lines = [(m["step"], m["loss_hex"], m["grad_norm_hex"]) for m in metrics_of(root)]
    ends = [event["parameter_digest"] for event in events_of(root, "run_finished")]
    return lines, RunDirectory(root).digests.read_text(), ends[-1]


def test_what_is_suspected_stands_out_from_half_of_the_parts() -> None:
    even = {number: Part(1.0, 1.0 + number / 10) for number in range(6)}
    assert suspects(even) == [5]
    assert suspects({**even, 2: Part(3.0, 1.0), 4: Part(1.0, 9.0)}) == [4, 2]
    assert suspects({number: Part(float(number), 1.0) for number in range(1, 9)}) == [8]
    assert suspects({number: Part(2.0**number, 1.0) for number in range(8)}) == [7, 6, 5, 4]
    assert suspects({0: Part(1.0, 0.0)}) == [0]


def test_a_poisonous_sample_is_found_and_the_run_ends_as_if_it_never_had_it(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """It is stopped later, and resumed by a configuration that does not name the sample."""
    number, step = poison_of(config_of(corpus))
    for layout, stop_after in (({"data": 2, "pipeline": 2}, step + 2), ({"data": 2}, 0)):
        train = {"stop_after": stop_after}
        config = config_of(corpus, parallel=layout, checkpoint={"every": 4}, train=train)
        train_in(cluster, config, tmp_path / "with")
    (event,) = events_of(tmp_path / "with", "rewound")
    assert event["samples"] == [number]
    assert event["spike"] == step + 1
    assert event["loss"] > 10 * event["loss_without"]
    assert f"sample {number}: 'VXRW" in event["message"]
    skipped = {event["step"] for event in events_of(tmp_path / "with", "step_skipped")}
    assert skipped == {event["step"] for event in events_of(tmp_path / "with", "not_rewound")}
    assert step + 1 not in skipped

    never = config_of(corpus, data={"without": [{"samples": [number]}]})
    train_in(cluster, never, tmp_path / "without")
    assert bits_of(tmp_path / "with") == bits_of(tmp_path / "without")


def test_a_stopped_run_goes_on_from_a_checkpoint_without_the_samples_named(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    """By hand; then it is resumed in another layout, by a configuration that does not say so."""
    skips = {"numerics": {"spike_action": "skip"}, "elastic": {"rewind": 0}}
    config = config_of(corpus, checkpoint={"every": 4, "keep": 0}, **skips)
    number, step = poison_of(config)
    run = tmp_path / "run"
    (tmp_path / "run.toml").write_text(dump_toml(config))
    assert holdfast(tmp_path, "train", "run.toml", "--out", "run").returncode == 0

    directory = RunDirectory(run)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 0 or before \(it has 4, 8, "):
        take_back_stopped(directory, config, 99, [])
    with pytest.raises(DataError, match="names sample 9999: the data has 128 samples"):
        take_back_stopped(directory, config, 5, [9999])
    done = holdfast(tmp_path, "rewind", "run", "--steps", "5", "--without", str(number))
    assert done.returncode == 0, done.stderr
    assert f"from its checkpoint of step 12 without sample {number}, 6 steps" in done.stdout
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert (run / "checkpoints" / "superseded-step-00000016").is_dir()

    resumed = holdfast(tmp_path, "train", "run.toml", "--out", "run", "--set", "parallel.data=2")
    assert resumed.returncode == 0, resumed.stderr
    assert f"without sample {number}, which it has removed after step 12" in resumed.stdout

    never = config_of(corpus, data={"without": [{"samples": [number]}]}, **skips)
    assert 12 <= step < STEPS
    train_in(cluster, never, tmp_path / "without")
    assert bits_of(run) == bits_of(tmp_path / "without")
    with pytest.raises(ConfigError, match=rf"checkpoint were without sample {number}\); change"):
        find_resume(tmp_path / "other", config, str(run / "checkpoints" / "step-00000016"))
    begun = find_resume(tmp_path / "other", config, str(run / "checkpoints" / "step-00000012"))
    assert begun.candidates
    found = load_config(directory.config, []).data.without
    assert found == [Removal(start=12, samples=[number])]


def suspect_steps(rank: int, world_size: int, store: Store, *, config: dict, step: int) -> Any:
    """Train until the step after `step`, counted from 0, and suspect each of the last three.

    `step` is applied, because the guard knows no steps before it then.

    Returns:
        What is found in each of them, and digests of the parameters before and after.
    """
    from holdfast.trainer.saves.rewind.search import Suspicion
    from holdfast.trainer.step import RecentSteps
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    known = RecentSteps()
    for number in range(step + 2):
        if number == step:
            known, training.progress.recent = training.progress.recent, RecentSteps()
        training.compute(number)
        assert training.vote(*training.reduce()).usable or number < step
        training.apply(run_config.rate_of(number))
    training.history.find(step).progress.recent = known
    before = training.parameter_digest()
    found = []
    for suspect in (step - 1, step):
        with training.trial():
            found.append(Suspicion(training, suspect, step + 1).culprit())
    return found, before, training.parameter_digest()


def test_a_sample_of_an_earlier_step_is_found_by_training_the_steps_after_it_again(
    cluster: Cluster, corpus: Path
) -> None:
    config = config_of(corpus, parallel={"data": 2})
    number, step = poison_of(config)
    job, plain = f"{__name__}:suspect_steps", msgspec.to_builtins(config)
    for (innocent, guilty), before, after in cluster.run(job, 2, config=plain, step=step):
        assert innocent is None
        assert (guilty.step, guilty.samples) == (step, (number,))
        assert after == before


def test_a_rank_lost_during_the_search_leaves_the_step_out(
    start: Starter, cluster: Cluster, corpus: Path
) -> None:
    """The other one has just begun to search."""
    skips = config_of(corpus, numerics={"spike_action": "skip"}, elastic={"rewind": 0})
    _, step = poison_of(skips)
    expected = elastic_bits_of(run_training(cluster, skips))

    killed = {"verify_every": 1, "rewind": 3, "chaos": [fault("kill", 1, step + 1, "apply")]}
    run = start(**sections_of(corpus, parallel={"data": 2}, elastic=killed))
    assert run.finish() == 0, run.output()
    assert run.events("rank_lost")
    assert step + 1 in {line["step"] for line in run.steps() if line.get("skipped") == "spike"}
    assert not run.events("rewound")
    assert not run.events("corruption")
    assert run.bits() == expected
