"""Training against what we did not write: transformers' Llama, torch's AdamW and a plain loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.config.sections import BatchStage
from holdfast.trainer.data import open_dataset
from holdfast.trainer.data.bigram import bigram_loss
from holdfast.trainer.data.opening import split_tokens
from holdfast.trainer.models.chunk import ModelChunk, build_whole_model
from support.oracles.plain_llama import PlainLlama, Shape, StepRecord, train_plainly
from support.oracles.plain_loop import batches_of, rates_of
from support.processes.cluster import Cluster
from support.runs.sequences import windows_of
from support.runs.small_runs import make_config, run_training, world_size_of


def whole_model(config: RunConfig) -> ModelChunk:
    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    return build_whole_model(
        config.model,
        dtype=dtypes[config.train.precision],
        device=torch.device("cpu"),
        seq_len=config.train.seq_len,
        micro_batch=config.train.micro_batch,
        seed=config.train.seed,
    )


def named_values(chunk: ModelChunk) -> dict[str, Tensor]:
    """The chunk's weights by Hugging Face name."""
    return {
        spec.name: parameter.detach()[spec.local_row : spec.local_row + spec.rows]
        for (*_, spec), parameter in chunk.rows()
        if spec.tied_use == 0
    }


def oracle(config: RunConfig) -> Any:
    """transformers' model with our initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab,
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.dim_per_head,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            max_position_embeddings=model.max_seq_len,
            tie_word_embeddings=model.tie_embeddings,
            attention_dropout=0.0,
        )
    )
    values = named_values(whole_model(config))
    missing, unexpected = theirs.load_state_dict(values, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    return theirs


MODELS = [
    {},
    {"kv_heads": 4},
    {"kv_heads": 1, "head_dim": 12},
    {"tie_embeddings": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_forward_and_gradients_equal_transformers(model: dict[str, Any]) -> None:
    config = make_config(model={"dropout": 0.0, **model}, train={"micro_batch": 3})
    chunk, theirs = whole_model(config), oracle(config)
    tokens = torch.randint(config.model.vocab, (3, 17), generator=torch.Generator().manual_seed(5))
    logits = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(chunk.logits(tokens[:, :-1]), logits, rtol=0, atol=1e-5)

    from holdfast.parallel.pipeline import Batch, MicroBatchContext

    loss = chunk(None, MicroBatchContext(0, 0, True, Batch(tokens[:, :-1], tokens[:, 1:])))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    gradients: dict[str, Tensor] = {}
    for (*_, spec), parameter in chunk.rows():
        assert parameter.grad is not None
        part = parameter.grad[spec.local_row : spec.local_row + spec.rows]
        gradients[spec.name] = gradients.get(spec.name, 0) + part
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def fifty_steps(micro_batch: int = 4, **sections: dict[str, Any]) -> RunConfig:
    return make_config(
        model={"dropout": 0.0, "layers": 2},
        train={"steps": 50, "global_batch": 8, "micro_batch": micro_batch},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
        **sections,
    )


@pytest.fixture(scope="module")
def plain_loop() -> list[StepRecord]:
    """What fifty lines of PyTorch give."""
    return plain_records()


def plain_records(
    skips: Callable[[list[StepRecord]], bool] = lambda records: False,
    sizes: list[int] | None = None,
) -> list[StepRecord]:
    config = fifty_steps(micro_batch=2)
    model = config.model
    plain = PlainLlama(
        Shape(
            layers=model.layers,
            hidden=model.hidden,
            intermediate=model.intermediate,
            heads=model.heads,
            kv_heads=model.kv_heads,
            vocab=model.vocab,
        )
    )
    plain.load_named(named_values(whole_model(config)))
    return train_plainly(
        plain,
        batches_of(config, sizes or ()),
        rates_of(config),
        steps=config.train.steps,
        micro_batch=config.train.micro_batch,
        skips=skips,
    )


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("reduction", "layout", "micro_batch"),
    [
        # One process has the bits of this one: tests/trainer/test_same_bits.py.
        ("exact", {"data": 2, "pipeline": 2, "schedule": "zb-h1"}, 2),
        ("fast", {}, 4),
        ("fast", {"tensor": 2}, 8),
    ],
    ids=str,
)
def test_fifty_steps_equal_a_plain_loop(
    cluster: Cluster,
    plain_loop: list[StepRecord],
    layout: dict[str, Any],
    reduction: str,
    micro_batch: int,
) -> None:
    config = fifty_steps(micro_batch, numerics={"reduction": reduction}, parallel=layout)
    ours = run_training(cluster, config)
    for record, loss, norm in zip(plain_loop, ours["losses"], ours["norms"], strict=True):
        assert float.fromhex(loss) == pytest.approx(record.loss, rel=1e-5)
        assert float.fromhex(norm) == pytest.approx(record.grad_norm, rel=1e-3)


@pytest.mark.mp
@pytest.mark.slow
def test_fifty_steps_without_spikes_equal_a_plain_loop_with_olmo_s_rule(cluster: Cluster) -> None:
    skipped = []

    def skips(records: list[StepRecord]) -> bool:
        """`SkipStepOptimizer.get_step_factor` of OLMo-core, for what is above the mean."""
        *before, last = records[-9:]
        if len(before) < 4:
            return False
        for name in ("loss", "grad_norm"):
            std, mean = torch.std_mean(torch.tensor([getattr(r, name) for r in before]))
            if (getattr(last, name) - mean) / std > 1.25:
                skipped.append(len(records))
                return True
        return False

    plain = plain_records(skips)
    guard = {"spike_window": 8, "spike_sigmas": 1.25}
    ours = run_training(cluster, fifty_steps(numerics=guard))
    assert 3 < len(skipped) < 25
    for record, loss, norm in zip(plain, ours["losses"], ours["norms"], strict=True):
        assert float.fromhex(loss) == pytest.approx(record.loss, rel=1e-5)
        assert float.fromhex(norm) == pytest.approx(record.grad_norm, rel=1e-3)


def losses_on_held_out_text(rank: int, world_size: int, store: Any, *, config: dict) -> float:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    for step in range(run_config.train.steps):
        training.compute(step)
        training.vote(*training.reduce())
        training.apply(run_config.rate_of(step))
    return training.evaluate()["held_out"]


@pytest.mark.mp
@pytest.mark.slow
def test_fifty_steps_of_a_growing_batch_equal_a_plain_loop(cluster: Cluster) -> None:
    plain = plain_records(sizes=[4] * 20 + [8] * 30)
    config = fifty_steps()
    ramp = [BatchStage(until=20, global_batch=4)]
    train = msgspec.structs.replace(config.train, batch_ramp=ramp)
    grown = msgspec.structs.replace(config, train=train)
    ours = run_training(cluster, grown)
    for record, loss, norm in zip(plain, ours["losses"], ours["norms"], strict=True):
        assert float.fromhex(loss) == pytest.approx(record.loss, rel=1e-5)
        assert float.fromhex(norm) == pytest.approx(record.grad_norm, rel=1e-3)


@pytest.mark.mp
def test_norms_and_outputs_by_layer_are_those_of_transformers(cluster: Cluster) -> None:
    config = make_config(
        model={"dropout": 0.0, "layers": 2},
        train={"steps": 1, "global_batch": 4},
        log={"norms_every": 1},
        parallel={"pipeline": 2},
    )
    found = run_training(cluster, config)
    theirs = oracle(config)
    outputs: list[torch.Tensor] = []
    for module in (theirs.model.embed_tokens, *theirs.model.layers):
        module.register_forward_hook(lambda *given: outputs.append(given[-1].detach().double()))
    data = open_dataset(config.data, vocab=config.model.vocab, seq_len=16, seed=config.train.seed)
    rows = torch.from_numpy(np.concatenate([windows_of(data.sample(row)) for row in range(4)]))
    logits = theirs(rows[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    of_layer = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 2}
    squares = torch.zeros(4, 2, dtype=torch.float64)
    for name, parameter in theirs.named_parameters():
        layer = next((n for start, n in of_layer.items() if name.startswith(f"{start}.")), 3)
        assert parameter.grad is not None
        values = (parameter.grad, parameter.detach())
        squares[layer] += torch.tensor([v.double().square().sum().item() for v in values])
    assert np.array(found["layer_norms"][0]) == pytest.approx(squares.sqrt().numpy(), rel=1e-5)
    sizes = [
        (output.square().mean().sqrt().item(), output.abs().max().item()) for output in outputs
    ]
    assert np.array(found["layer_outputs"][0]) == pytest.approx(np.array(sizes), rel=1e-5)


def losses_at_the_start(
    rank: int, world_size: int, store: Any, *, config: dict
) -> dict[str, float]:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    return open_training(convert_config(config), local_world(rank, world_size), store).evaluate()


@pytest.mark.mp
def test_the_loss_of_a_validation_set_is_that_of_a_plain_loop_over_its_windows(
    cluster: Cluster, tmp_path: Path
) -> None:
    text = ("Tyger Tyger, burning bright, In the forests of the night " * 3)[:128]
    (tmp_path / "poem.txt").write_text(text)
    sets = [{"name": "poem", "kind": "text", "path": [str(tmp_path / "poem.txt")]}]
    config = make_config(
        model={"dropout": 0.0, "layers": 2, "vocab": 257},
        data={"validation": sets},
        train={"global_batch": 8, "micro_batch": 2, "eval_every": 1},
        parallel={"pipeline": 2},
    )
    plain, function = msgspec.to_builtins(config), "test_oracles:losses_at_the_start"
    ours = cluster.run(function, 2, config=plain)
    tokens = torch.tensor([*text.encode(), 256])
    windows = torch.stack([tokens[first : first + 17] for first in range(0, 128, 16)])
    logits = oracle(config)(windows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert ours[0] == ours[1]
    assert ours[0]["poem"] == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_text_run_learns_more_than_a_bigram_model(cluster: Cluster, tmp_path: Path) -> None:
    """The text is of few words: these are soon learnt, and bytes by their last one never."""
    words = "and did he who made the lamb make thee in what distant deeps or skies burnt fire"
    chance = random.Random(1)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(chance.choice(words.split()) for _ in range(10000)))
    config = make_config(
        model={
            "layers": 1,
            "hidden": 64,
            "intermediate": 172,
            "heads": 4,
            "vocab": 257,
            "dropout": 0.0,
        },
        data={"kind": "text", "path": [str(path)]},
        train={
            "steps": 60,
            "seq_len": 32,
            "global_batch": 32,
            "micro_batch": 16,
            "eval_batches": 16,
        },
        optimizer={"lr": 1e-2, "min_lr": 3e-4, "warmup_steps": 10, "block_elements": 65536},
        parallel={"data": 2},
    )
    held_out = cluster.run(
        "test_oracles:losses_on_held_out_text",
        world_size_of(config),
        config=msgspec.to_builtins(config),
        timeout_s=280,
    )[0]
    tokens = {
        split: split_tokens(config.data, vocab=257, seq_len=32, split=split)
        for split in ("train", "eval")
    }
    assert held_out < bigram_loss(tokens["train"], tokens["eval"], 257)
