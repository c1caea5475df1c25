"""The reference that layouts are held against: the unsharded model under a plain autograd loop."""

from __future__ import annotations

import torch
from torch import nn

from holdfast.parallel.layout import ParameterSpec
from holdfast.parallel.optimizer import OPTIMIZERS
from holdfast.parallel.pipeline import MicroBatchContext
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.check.capture import ActivationRecorder, RankCapture, piece_of, watch_chunk
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.models import build_chunk
from holdfast.trainer.step import rate_of


def run_reference(config: RunConfig) -> RankCapture:
    """Train all steps in this process: autograd, clip_grad_norm_, the rule's reference. Local.

    Every weight's gradient comes from autograd itself; none of the accumulators, reductions,
    optimizer shards or schedules of a run takes part.
    """
    train = config.train
    capture = RankCapture()
    chunk = build_chunk(
        config.model,
        range(config.model.layers + 2),
        tensor=None,
        sequence_parallel=False,
        dtype=PRECISIONS[train.precision].dtype,
        device=torch.device("cpu"),
        seq_len=train.seq_len,
        micro_batch=train.micro_batch,
        recompute="none",
        seed=train.seed,
    )
    rows = [(spec, parameter) for _, spec, parameter in chunk.named_specs()]
    tied = _tied(rows)
    second_uses = {second for _, second in tied}
    parameters = {p: spec for spec, p in rows if p not in second_uses}
    rule = OPTIMIZERS[config.optimizer.name]
    groups = [
        ([p for p, spec in parameters.items() if spec.decay is decays], decays)
        for decays in (True, False)
    ]
    optimizer = rule.reference(groups, rule.settings(config.optimizer))
    data = open_dataset(
        config.data,
        vocab=config.model.vocab,
        seq_len=train.seq_len,
        seed=config.data.seed or train.seed,
        split="train",
    )
    count = train.global_batch // train.micro_batch
    tokens_of_step = train.global_batch * train.seq_len
    running = [0]
    recorder = ActivationRecorder(capture, lambda: running[0])
    watch_chunk(recorder, chunk, config.model.hidden)
    for step in range(train.steps):
        optimizer.zero_grad()
        total = 0.0
        for micro_batch in range(count):
            running[0] = micro_batch
            tokens = data.batch(
                step,
                micro_batch,
                global_batch=train.global_batch,
                micro_batch_size=train.micro_batch,
            )
            context = MicroBatchContext(step, micro_batch, True, tokens)
            loss = chunk(None, context)
            (loss / tokens_of_step).backward()
            total += loss.item()
        for first, second in tied:
            assert first.grad is not None
            assert second.grad is not None
            first.grad += second.grad
            second.grad = None
        if step == 0:
            recorder.stop()
            capture.gradients = _pieces(rows, second_uses, gradients=True)
        capture.losses.append(total / tokens_of_step)
        clip = train.clip_grad_norm or float("inf")
        capture.grad_norms.append(float(nn.utils.clip_grad_norm_(list(parameters), clip)))
        for group in optimizer.param_groups:
            group["lr"] = rate_of(config, step)
        optimizer.step()
        for first, second in tied:
            second.data.copy_(first.data)
    capture.parameters = _pieces(rows, second_uses, gradients=False)
    return capture


def _tied(
    rows: list[tuple[ParameterSpec, nn.Parameter]],
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(first use, second use) of tied weights."""
    first = {spec.name: parameter for spec, parameter in rows if spec.tied_use == 0}
    return [(first[spec.name], parameter) for spec, parameter in rows if spec.tied_use]


def _pieces(
    rows: list[tuple[ParameterSpec, nn.Parameter]], skipped: set[nn.Parameter], *, gradients: bool
) -> list:
    pieces = []
    for spec, parameter in rows:
        if parameter in skipped:
            continue
        values = parameter.grad if gradients else parameter
        assert values is not None
        matrix = values[spec.local_row : spec.local_row + spec.rows]
        pieces.append(piece_of(spec, matrix))
    return pieces
