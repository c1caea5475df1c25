"""Training on documents: against plain PyTorch and transformers, in every layout, and apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.parallel.pipeline import Batch, Documents, MicroBatchContext
from holdfast.trainer.models.chunk import ModelChunk, build_whole_model
from support.oracles.plain_llama import Packed, PlainLlama, Shape
from support.processes.cluster import Cluster
from support.runs.layouts import tiny
from support.runs.small_runs import (
    findings_of,
    make_config,
    metrics_of,
    run_in,
    run_training,
)

LENGTHS = [[5, 1, 9, 1], [16], [2, 14]]
"""Of the documents of three sequences of 16."""


def chunk_of(dtype: torch.dtype, vocab_chunk: int = 0, **model: Any) -> ModelChunk:
    config = make_config(model={"dropout": 0.0, "layers": 2, **model})
    return build_whole_model(
        config.model,
        dtype=dtype,
        device=torch.device("cpu"),
        seq_len=16,
        micro_batch=3,
        seed=7,
        vocab_chunk=vocab_chunk,
    )


def batch_of(tokens: Tensor) -> Batch:
    """Documents of `LENGTHS`: nothing is predicted from the last place of each."""
    documents = Documents.of((length for row in LENGTHS for length in row), len(LENGTHS))
    targets = tokens.roll(-1, 1)
    targets.view(-1)[torch.tensor(documents.cu_seqlens[1:]) - 1] = -1
    return Batch(tokens, targets, documents)


def tokens_of(vocab: int = 67) -> Tensor:
    return torch.randint(vocab, (3, 16), generator=torch.Generator().manual_seed(5))


def numbers() -> Tensor:
    rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in LENGTHS]
    return torch.tensor(rows)


def gradients_of(chunk: ModelChunk) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for (*_, spec), parameter in chunk.rows():
        assert parameter.grad is not None
        found[spec.name] = parameter.grad[spec.local_row : spec.local_row + spec.rows]
    return found


@pytest.mark.parametrize("vocab_chunk", [0, 20])
def test_loss_and_gradients_equal_plain_torch_with_the_mask_written_out(vocab_chunk: int) -> None:
    chunk, batch = chunk_of(torch.float64, vocab_chunk), batch_of(tokens_of())
    assert batch.documents is not None
    plain = PlainLlama(
        Shape(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, vocab=67)
    ).double()
    plain.load_named(
        {
            spec.name: p.detach()[spec.local_row : spec.local_row + spec.rows]
            for (*_, spec), p in chunk.rows()
        }
    )
    packed = Packed(numbers(), batch.documents.positions.t())
    logits = plain(batch.tokens, packed).flatten(0, 1)
    expected = F.cross_entropy(logits, batch.targets.flatten(), reduction="sum", ignore_index=-1)
    loss = chunk(None, MicroBatchContext(0, 0, True, batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    found = gradients_of(chunk)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-11)


@pytest.mark.slow
def test_each_document_equals_transformers_with_position_ids() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    chunk, batch = chunk_of(torch.float32), batch_of(tokens_of())
    assert batch.documents is not None
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    theirs.set_attn_implementation("eager")
    theirs.load_state_dict(
        {
            spec.name: p.detach()[spec.local_row : spec.local_row + spec.rows]
            for (*_, spec), p in chunk.rows()
        }
    )
    positions = batch.documents.positions.t()
    mask = torch.zeros(3, 1, 16, 16).masked_fill(
        ~Packed(numbers(), positions).mask, torch.finfo(torch.float32).min
    )
    with torch.no_grad():
        logits = theirs(batch.tokens, attention_mask=mask, position_ids=positions).logits
    for number in range(4):
        own = batch.targets.where(numbers() == number, -1)
        expected = F.cross_entropy(
            logits.flatten(0, 1), own.flatten(), reduction="sum", ignore_index=-1
        )
        with torch.no_grad():
            loss = chunk(None, MicroBatchContext(0, 0, False, batch._replace(targets=own)))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_chunk", [0, 20])
def test_another_document_changes_no_bit_of_ones_loss_and_gradients(
    dtype: torch.dtype, vocab_chunk: int
) -> None:
    """Documents of all sequences change but one, whose places alone are predicted."""
    kept = torch.zeros(3, 16, dtype=torch.bool)
    kept[0, 6:15] = True
    results = []
    for shift in (0, 31):
        chunk = chunk_of(dtype, vocab_chunk)
        batch = batch_of(tokens_of())
        others = (batch.tokens + shift) % 67
        batch = batch._replace(
            tokens=batch.tokens.where(kept, others), targets=batch.targets.where(kept, -1)
        )
        loss = chunk(None, MicroBatchContext(0, 0, True, batch))
        loss.backward()
        results.append((loss.item(), gradients_of(chunk)))
    (first, gradients), (second, others) = results
    assert first == second != 0.0
    for name, gradient in gradients.items():
        assert gradient.equal(others[name]), name


def test_a_documents_bits_do_not_depend_on_its_place() -> None:
    """The same document, alone at the beginning of a sequence and after others, in fp32."""
    chunk, tokens = chunk_of(torch.float32), tokens_of()
    losses = []
    for before in (0, 3, 7):
        lengths = [before, 9, 7 - before]
        row = torch.cat([tokens[1, :before], tokens[0, :9], tokens[2, : 7 - before]])
        batch_tokens = torch.stack([row, row, row])
        targets = torch.full_like(batch_tokens, -1)
        targets[0, before : before + 8] = tokens[0, 1:9]
        documents = Documents.of([n for n in lengths if n] * 3, 3)
        batch = Batch(batch_tokens, targets, documents)
        losses.append(chunk(None, MicroBatchContext(0, 0, False, batch)).item())
    assert losses[0] == losses[1] == losses[2]


STEPS = 2
"""The second begins with what the first has changed."""


def run_of(layout: dict[str, Any], data: dict[str, Any], **keys: dict[str, Any]) -> Any:
    return make_config(
        train={"steps": STEPS, "seq_len": 32, "global_batch": 4, **keys.pop("train", {})},
        data={"kind": "synthetic", "packing": "documents", **data},
        parallel=layout,
        **keys,
    )


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layout"),
    [("fp32", {"data": 3}), ("bf16", {"data": 3, "pipeline": 2, "schedule": "zb-h1"})],
    ids=["fp32", "bf16"],
)
def test_layouts_give_the_same_bits(
    cluster: Cluster, precision: str, layout: dict[str, Any]
) -> None:
    """Three replicas; tests/trainer/test_layout_pairs.py has every pair in powers of two."""
    keys: dict[str, Any] = {"model": {"layers": 2}, "train": {"precision": precision}}
    alone, divided = (run_training(cluster, run_of(one, {}, **keys)) for one in ({}, layout))
    assert len(set(alone["losses"])) == STEPS
    assert divided == alone


@pytest.mark.mp
@pytest.mark.slow
def test_whole_documents_give_the_same_bits_in_every_layout(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Packed text, with padding in nearly every sequence."""
    texts = ["".join(chr(97 + (n * k) % 26) for k in range(n)) for n in range(3, 60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    data = {"kind": "text", "path": [str(tmp_path / "texts.jsonl")], "packing": "best-fit"}
    model = {"vocab": 257, "layers": 2}
    alone = run_training(cluster, run_of({}, data, model=model))
    layout = {"pipeline": 2, "data": 3}
    assert run_training(cluster, run_of(layout, data, model=model)) == alone


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"tensor": 2, "sequence_parallel": False, "data": 2}, {"pipeline": 3}],
    ids=str,
)
def test_layouts_equal_autograd_in_float64(cluster: Cluster, layout: dict[str, Any]) -> None:
    config = with_documents(tiny(layout, {"layers": 3} if "pipeline" in layout else {}))
    assert findings_of(cluster, config) == []


@pytest.mark.mp
@pytest.mark.slow
def test_a_stage_that_knows_no_documents_is_found(cluster: Cluster) -> None:
    config = with_documents(tiny({"pipeline": 3}, {"layers": 3}))
    found = findings_of(cluster, config, "stage_without_documents")
    assert found[0].kind == "activation"
    assert "block.1" in str(found[0])


def with_documents(config: Any) -> Any:
    data = msgspec.structs.replace(config.data, packing="documents")
    return msgspec.structs.replace(config, data=data)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_run_resumes_in_another_layout_with_the_same_bits(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The loss of a step counts by its own tokens, before and after."""
    keys: dict[str, Any] = {
        "train": {"steps": 6, "eval_every": 3, "eval_batches": 2},
        "model": {"layers": 2},
        "checkpoint": {"every": 2},
    }

    def train(layout: dict[str, Any], name: str, **more: Any) -> None:
        run_in(cluster, run_of(layout, {}, **keys), tmp_path / name, **more)

    train({}, "whole")
    with pytest.raises(Exception, match=r"\S"):
        train({"data": 2}, "parts", kill=(1, 4))
    train({"pipeline": 2}, "parts")
    told = [
        [(line["loss_hex"], line["grad_norm_hex"]) for line in metrics_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert told[0] == told[1]
    assert len(told[0]) == 6
