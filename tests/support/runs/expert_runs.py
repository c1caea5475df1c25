"""Trainings of models with experts that keep how many tokens each expert had."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import Store

from holdfast.parallel.expert_parallel import Router


def train_counting(rank: int, world_size: int, store: Store, *, config: dict) -> list[Any]:
    """Train all steps on this rank. Returns of each step, by layer, the choices of each expert."""
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    found = []
    for step in range(run_config.train.steps):
        training.compute(step)
        outcome = training.vote(*training.reduce())
        training.apply(run_config.rate_of(step))
        found.append(outcome.loads)
    return found


def train_balancing(
    rank: int, world_size: int, store: Store, *, config: dict, in_turn: bool = False
) -> Any:
    """Train all steps on this rank.

    Args:
        in_turn: whether tokens go to the experts in turn, whatever their scores.
    Returns:
        The loads of each step, and after all of them the biases of the routers by name.
    """
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    loads = []
    with mock.patch.object(Router, "_best", _in_turn if in_turn else Router._best):
        for step in range(run_config.train.steps):
            training.compute(step)
            loads.append(training.vote(*training.reduce()).loads)
            training.apply(1e-3)
    training.parameter_digest()  # parameters of the last update have arrived
    biases = {
        spec.name: parameter.detach().tolist()
        for chunk in training.chunks
        for (*_, spec), parameter in chunk.rows()
        if spec.balance is not None
    }
    return loads, biases


def _in_turn(router: Router, scores: Tensor, bias: Tensor | None) -> Tensor:
    """One expert for each token: the first expert for the first token, and so on."""
    assert router.per_token == 1
    tokens, experts = scores.shape
    return (torch.arange(tokens, device=scores.device) % experts)[:, None]


def train_one_expert(
    rank: int, world_size: int, store: Store, *, config: dict, bug: str = ""
) -> list[list[tuple[list[float], bool]]]:
    """Train all steps on this rank, with all tokens at the first expert of each layer.

    Args:
        bug: of `expert_bugs`.
    Returns:
        Before the first step and after each: the weights of each matrix of an expert that is here,
        and whether tokens came to it.
    """
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world
    from support.oracles import expert_bugs

    def first(_: Router, scores: Tensor, bias: Tensor | None) -> Tensor:
        return torch.zeros(len(scores), 1, dtype=torch.int64, device=scores.device)

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    weights = [
        (parameter, ".experts.0." in spec.name)
        for chunk in training.chunks
        for (*_, spec), parameter in chunk.rows()
        if ".experts." in spec.name
    ]
    found = [[(p.flatten().tolist(), has) for p, has in weights]]
    put = getattr(expert_bugs, bug) if bug else nullcontext
    with mock.patch.object(Router, "_best", first), put():
        for step in range(run_config.train.steps):
            training.compute(step)
            training.vote(*training.reduce())
            training.apply(1e-2)
            training.parameter_digest()  # the parameters have arrived
            found.append([(p.flatten().tolist(), has) for p, has in weights])
    return found


def hidden_at_the_head(
    rank: int, world_size: int, store: Store, *, config: dict, others: int
) -> Any:
    """What comes to the head of the first sample of a step, and its loss.

    Args:
        others: added to every token of the other samples.
    """
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.models.decoder.ends import Head
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.step.micro_batches.contexts import MicroBatches
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    found: list[Any] = []
    context_of, losses_of = MicroBatches.context, Head.forward

    def changed(self: MicroBatches, passage: Any) -> Any:
        context = context_of(self, passage)
        if context.batch is None or context.micro_batch == 0:
            return context
        tokens = (context.batch.tokens + others) % run_config.model.vocab
        return replace(context, batch=context.batch._replace(tokens=tokens))

    def kept(self: Any, values: list[Tensor], context: Any) -> Any:
        losses = losses_of(self, values, context)
        if context.micro_batch == 0:
            found.append(([value.tolist() for value in values], [loss.item() for loss in losses]))
        return losses

    with (
        mock.patch.object(MicroBatches, "context", changed),
        mock.patch.object(Head, "forward", kept),
    ):
        training = open_training(run_config, local_world(rank, world_size), store)
        training.compute(0)
    loads = training.vote(*training.reduce()).loads
    return found, loads
