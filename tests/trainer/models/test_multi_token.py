"""Multi-token prediction is that of the paper, and of transformers: see plain_deepseek.py."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from holdfast.launch.text import describe_model, load_model
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import Slices, slices_of
from holdfast.parallel.pipeline import Batch, Documents, MicroBatchContext
from holdfast.trainer.config import convert_config
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.models import build_whole_model
from holdfast.trainer.step import layers_of_config, open_split
from holdfast.trainer.step.planning import plan_of
from support.oracles.plain_deepseek import PlainDeepseek
from support.oracles.plain_llama import train_plainly
from support.oracles.plain_loop import batches_of, rates_of
from support.oracles.transformers_models import (
    DEEPSEEK,
    SIZES,
    by_name,
    context_of,
    fused,
    gradient_of,
    our_model,
    small_model,
    their_model,
    tokens_of,
    value_of,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, metrics_of, run_training, world_size_of

KEYS: dict[str, Any] = DEEPSEEK | {
    "multi_token_layers": 1,
    "multi_token_loss_coef": 0.3,
    "router_aux_loss_coef": 0.0,
}
LENGTHS = [11, 13, 1, 8, 2, 13]
"""Those of the documents in two sequences of 24 tokens."""


def of_documents(rows: Tensor) -> tuple[Batch, list[Tensor]]:
    """A batch of documents that predict nothing at their ends, and the documents."""
    targets, flat = rows.roll(-1, 1), rows.flatten()
    ends = torch.tensor(LENGTHS).cumsum(0)
    targets.view(-1)[ends - 1] = -1
    return Batch(rows, targets, Documents.of(LENGTHS, 2)), list(flat.split(LENGTHS))


@pytest.mark.parametrize("vocab_chunk", [0, 5])
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "documents"])
def test_losses_and_gradients_are_those_of_a_plain_module(
    packed: bool, slices: int, vocab_chunk: int
) -> None:
    model: Any = small_model(**KEYS)
    chunk = our_model(model, torch.float64, vocab_chunk=vocab_chunk)
    plain = PlainDeepseek(model, by_name(chunk, value_of))
    tokens = tokens_of(model, 2, 25)
    batch, documents = Batch(tokens[:, :-1], tokens[:, 1:]), list(tokens)
    if packed:
        batch, documents = of_documents(tokens[:, :-1].contiguous())
    cut = Slices(24 // slices, (0,) * slices) if slices > 1 else Slices()
    losses = chunk(None, MicroBatchContext(0, 0, True, batch, slices=cut))
    losses.sum().backward()
    expected = plain.losses([document for document in documents if len(document) > 1])
    (expected[0] + 0.3 * expected[1]).backward()
    torch.testing.assert_close(
        losses.view(slices, 2).sum(0), torch.stack(expected), rtol=1e-10, atol=0
    )
    found, theirs = by_name(chunk, gradient_of), plain.gradients()
    balanced = {name for name in found if name.endswith("e_score_correction_bias")}
    assert found.keys() - balanced == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_logits_of_both_tokens_are_those_of_transformers() -> None:
    from transformers.modeling_layers import MtpModel

    model = small_model(**KEYS)
    chunk = our_model(model, torch.float64)
    weights = fused(by_name(chunk, value_of))
    own = {name: value for name, value in weights.items() if ".layers.3." in name}
    theirs = their_model(
        model, {name: weights[name] for name in weights.keys() - own.keys()}, torch.float64
    ).eval()
    more: Any = MtpModel(theirs, 1).double().eval()
    names = {name: name.removeprefix("model.layers.3.") for name in own}
    theirs_alone = {"shared_head.norm.weight": "post_norm.weight"}
    joins = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    layer: Any = more.layers[0]
    layer.load_state_dict(
        {
            theirs_alone.get(short, short if short in joins else f"mtp_block.{short}"): own[name]
            for name, short in names.items()
        }
    )
    tokens = tokens_of(model, 2, 25)
    places = torch.arange(24)[None]
    mask = torch.full((24, 24), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        states = theirs.model(tokens[:, :-1]).last_hidden_state
        found = layer(
            theirs.model.embed_tokens(tokens[:, 1:]),
            states,
            position_embeddings=theirs.model.rotary_emb(states, places),
            attention_mask=mask,
            position_ids=places,
            past_key_values=None,
        )
        second = theirs.lm_head(found)
        torch.testing.assert_close(
            chunk.logits(tokens[:, :-1]), theirs.lm_head(states), rtol=0, atol=1e-5
        )
        context = context_of(tokens)
        first, *layers, head = chunk.layers.values()
        values = first(None, context)
        for module in layers:
            values = module(values, context)
        [ours] = head.further([head.norm(value) for value in values], context)
        torch.testing.assert_close(
            ours.transpose(0, 1) @ head.projection[0].T, second, rtol=0, atol=1e-5
        )


class _Loop(nn.Module):
    """The plain model as a loop trains it, which keeps the states of each pass."""

    def __init__(self, model: PlainDeepseek) -> None:
        super().__init__()
        self.model = model
        self.states: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.states = list(map(self.model.states, tokens))
        return torch.stack(list(map(self.model.logits, self.states)))


@pytest.mark.mp
@pytest.mark.slow
def test_fifty_steps_equal_a_plain_loop(cluster: Cluster) -> None:
    config = make_config(
        model={"layers": 2, "dropout": 0.0, **KEYS, "router_bias_speed": 0.0},
        train={"steps": 50, "global_batch": 2, "seq_len": 12, "precision": "fp64"},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
    )
    chunk = build_whole_model(
        config.model,
        dtype=torch.float64,
        device=torch.device("cpu"),
        seq_len=config.train.seq_len,
        micro_batch=1,
        seed=config.train.seed,
    )
    model: Any = config.model
    plain = PlainDeepseek(model, by_name(chunk, value_of))
    loop, second = _Loop(plain), list[float]()

    def further(rows: Tensor) -> Tensor:
        loss = plain.second_loss(loop.states, list(rows))
        second.append(loss.item())
        return 0.3 * loss

    records = train_plainly(
        loop, batches_of(config), rates_of(config), steps=50, micro_batch=1, further=further
    )
    ours = run_training(cluster, config)
    tokens = 2 * 12
    for step, record in enumerate(records):
        assert float.fromhex(ours["losses"][step]) == pytest.approx(record.loss, rel=1e-11)
        assert float.fromhex(ours["norms"][step]) == pytest.approx(record.grad_norm, rel=1e-9)
        [found] = ours["further"][step]
        mean = (second[2 * step] + second[2 * step + 1]) / tokens
        assert float.fromhex(found) == pytest.approx(mean, rel=1e-11)
    assert records[-1].loss < 0.9 * records[0].loss
    assert second[-1] < 0.9 * second[0]


CONSTANTS: dict[str, Any] = {
    "model": {
        **KEYS,
        "layers": 4,
        "dense_layers": [0, 1],
        "router_aux_loss_coef": 0.1,
        "router_bias_speed": 0.05,
    },
    "data": {"packing": "documents"},
    "numerics": {"tensor_shards": 2},
}
LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({"pipeline": 2, "virtual": 2, "schedule": "zb-v"}, "selective"),  # the last chunk is rank 0's
    ({"pipeline": 2, "virtual": 2, "schedule": "interleaved-1f1b", "data": 2}, "full"),
    ({"pipeline": 3, "blocks_per_chunk": [2, 2, 0], "schedule": "zb-h1"}, "none"),
    ({"tensor": 2, "pipeline": 2, "data": 2, "shard": "parameters"}, "full"),
    ({"pipeline": 2, "stretches": 2}, "selective"),
]
"""Beside those of test_family_layouts.py: where the head lies, and with whom it shares."""


def of_layout(layout: dict[str, Any], recompute: str) -> Any:
    train = {
        "steps": 2,
        "seq_len": 16,
        "context_chunks": 2,
        "global_batch": 2,
        "vocab_chunk": 5,
        "z_loss_coef": 0.01,
        "recompute": recompute,
    }
    return make_config(**CONSTANTS, train=train, parallel=layout)


@pytest.fixture(scope="module")
def alone(cluster: Cluster) -> dict[str, Any]:
    return run_training(cluster, of_layout({}, "none"))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "recompute"), LAYOUTS, ids=str)
def test_losses_of_both_tokens_have_the_same_bits_in_any_layout(
    cluster: Cluster, alone: dict[str, Any], layout: dict[str, Any], recompute: str
) -> None:
    config = of_layout(layout, recompute)
    assert problems_of(config, None) == []
    found = run_training(cluster, config)
    assert found == alone
    assert len({loss for [loss] in found["further"]} | set(found["losses"])) == 4


@pytest.mark.mp
@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_with_the_same_bits(
    cluster: Cluster, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Its evaluation is of next tokens alone, before and after."""
    first = of_layout({"pipeline": 2}, "none")
    first = replace(first, train=replace(first.train, stop_after=1, eval_every=1, eval_batches=1))
    for layout in (first.parallel, of_layout({"tensor": 2}, "full").parallel):
        config = replace(first, parallel=layout)
        cluster.run(
            "support.runs.small_runs:train_in",
            world_size_of(config),
            timeout_s=90.0,
            config=msgspec.to_builtins(config),
            root=str(tmp_path),
        )
        first = replace(first, train=replace(first.train, stop_after=0))
    lines = metrics_of(tmp_path)
    assert [line["loss_hex"] for line in lines] == alone["losses"]
    assert [[line["multi_token_loss_hex"]] for line in lines] == alone["further"]
    assert all(line["multi_token_loss"] > 2.0 for line in lines)
    place = tmp_path / "checkpoints" / "step-00000002"
    described = json.loads((place / "config.json").read_text())
    assert described["num_nextn_predict_layers"] == 1
    names = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    of_layer = {name.removeprefix("model.layers.4.") for name in names if ".layers.4." in name}
    joins = {f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    assert of_layer > joins
    assert len(of_layer - joins) == sum(".layers.3." in name for name in names)
    source = describe_model(str(tmp_path))
    assert source.section.multi_token_layers == 0  # pyrefly: ignore
    model = load_model(source, torch.device("cpu"), 16, like=first)
    data = open_split(first, "eval")
    batches = partial(data.batch, 0, global_batch=2, micro_batch_size=1)
    slices = slices_of(16, 2, 1, 0)
    total = 0.0
    for number in range(2):
        context = MicroBatchContext(0, 0, False, batches(number), slices=slices)
        total += model.chunk(None, context).sum().item()
    predicted = data.predicted(0, global_batch=2)
    assert total / predicted == pytest.approx(lines[-1]["validation"]["held_out"])


def test_without_training_there_is_the_main_model_alone() -> None:
    model: Any = small_model(**KEYS)
    chunk = our_model(model, torch.float32)
    plain = our_model(small_model(**{**KEYS, "multi_token_layers": 0}), torch.float32)
    values = by_name(chunk, value_of)
    for (*_, spec), parameter in plain.rows():
        rows = slice(spec.local_row, spec.local_row + spec.rows)
        parameter.data[rows] = values[spec.name]
    context = dataclasses.replace(context_of(tokens_of(model, 2, 25)), training=False)
    assert torch.equal(chunk(None, context), plain(None, context))
    tokens = tokens_of(model, 2, 24)
    assert torch.equal(chunk.logits(tokens), plain.logits(tokens))


def test_the_token_after_the_next_ends_with_its_document() -> None:
    tokens = torch.arange(12)[None]
    whole = Batch(tokens, tokens + 1)
    assert whole.next_tokens().tolist() == (tokens + 1).tolist()
    assert whole.further_targets()[0].tolist() == [*range(2, 13), -1]
    # Ends that predict nothing, and one in a document that is cut, whose next token is known.
    targets = torch.tensor([[1, 2, -1, 4, 5, 6, 7, -1, -1, 10, 11, -1]])
    packed = Batch(tokens, targets, Documents.of([3, 4, 1, 1, 3], 1))
    assert packed.next_tokens()[0].tolist() == [1, 2, 2, 4, 5, 6, 7, 7, 8, 10, 11, 11]
    assert packed.further_targets()[0].tolist() == [2, -1, -1, 5, 6, 7, -1, -1, -1, 11, -1, -1]


def test_what_does_not_go_with_it_is_refused() -> None:
    for keys, said in (
        ({"multi_token_layers": 2}, "model.multi_token_layers = 2: one layer may predict"),
        ({"tie_embeddings": True}, "with model.tie_embeddings = true"),
        ({"multi_token_loss_coef": -1.0}, "model.multi_token_loss_coef = -1.0"),
    ):
        [problem] = problems_of(make_config(model={**KEYS, **keys}), None)
        assert said in problem
    with pytest.raises(ConfigError, match="multi_token_layers"):
        convert_config({"model": {**SIZES, **KEYS, "num_nextn_predict_layers": 1}})


def test_its_matrices_are_updated_as_matrices() -> None:
    plan = plan_of(make_config(model=KEYS, optimizer={"name": "muon"}))
    of_layer = [plan.spec_of(block).name for block in plan.blocks[0] if block.weight]
    assert "model.layers.6.eh_proj.weight" in of_layer
    theirs = {name.replace("layers.6.", "layers.5.") for name in of_layer if "layers.6." in name}
    assert theirs - {"model.layers.5.eh_proj.weight"} == {n for n in of_layer if "layers.5." in n}
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & {*of_layer}


def test_its_costs_are_those_of_a_layer_a_product_and_logits() -> None:
    plain = make_config(model={**KEYS, "multi_token_layers": 0}, train={"recompute": "full"})
    both = replace(plain, model=replace(plain.model, multi_token_layers=1))
    *_, layer, before = layers_of_config(plain)
    after = layers_of_config(both)[-1]
    tokens, hidden = plain.train.seq_len, plain.model.hidden
    joined = 2.0 * tokens * 2 * hidden * hidden
    assert after.forward_flops == 2 * before.forward_flops + layer.forward_flops + joined
    assert after.recompute_flops == layer.recompute_flops
    assert (after.attention_flops, after.keys_bytes) == (layer.attention_flops, layer.keys_bytes)
    elements = [sum(row.elements for row in one.parameters[0]) for one in (layer, before, after)]
    vocabulary = plain.model.vocab * hidden
    assert elements[2] == elements[0] + elements[1] + vocabulary + 2 * hidden**2 + 3 * hidden
