"""One rank of the checked layout: the real trainer, with a capture."""

from __future__ import annotations

from torch.distributed import Store

from holdfast.trainer.check.capture import (
    ActivationRecorder,
    RankCapture,
    captured_box,
    watch_chunk,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step import open_training
from holdfast.trainer.worlds import WorldInfo


def run_layout(config: RunConfig, world: WorldInfo, store: Store) -> RankCapture:
    """Train `config.train.steps` steps on this rank. Returns the capture. Collective."""
    training = open_training(config, world, store)
    mesh = training.plan.configured_mesh
    capture = RankCapture(mesh.place(world.rank), training.plan.parts_of(world.rank))
    slices = training.slices
    capture.slices = slices.count
    recorder = ActivationRecorder(capture, lambda: training.current_micro_batch, slices.own)
    for chunk in training.chunks:
        watch_chunk(recorder, chunk, config.model.hidden)
    buffer, accumulator = training.parameter_buffer, training.accumulator
    for step in range(config.train.steps):
        training.compute(step)
        if step == 0:
            recorder.close()
            training.optimizer.finish_sums()
            scale = 2.0**-accumulator.fraction_bits if accumulator.exact else 1.0
            capture.partial_gradients = [
                captured_box(segment.spec, sums.double() * scale, rows)
                for segment, rows, sums in buffer.kept_rows(accumulator.kept, accumulator.part)
            ]
        squares, flags = training.reduce()
        if step == 0:
            capture.gradients = [
                captured_box(owned.spec, gradient, (owned.block.row_start, owned.block.row_stop))
                for owned, gradient in training.optimizer.owned_gradients()
            ]
        outcome = training.vote(squares, flags)
        capture.losses.append(outcome.loss)
        capture.grad_norms.append(outcome.grad_norm)
        training.apply(config.rate_of(step))
    training.finish_gather()
    capture.parameters = [
        captured_box(segment.spec, values, rows)
        for segment, rows, values in buffer.kept_rows(buffer.kept, buffer.part)
    ]
    return capture
