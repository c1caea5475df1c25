"""A layer's experts (Shazeer et al. 2017): a router, and an MLP for each expert.

A rank has the experts of its parts, as it has the features of an MLP. Each expert's tokens of a
slice are computed as one, wherever they come from. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.parallel.expert_parallel import (
    LOAD_UNIT,
    Choices,
    Router,
    add_gradient,
    add_loss,
    balance_loss,
    dispatch,
    expert_products,
    logits_of,
)
from holdfast.parallel.pipeline import MicroBatchContext, TokensKey, WeightGradientQueue
from holdfast.parallel.tensor_parallel import TensorParallel, in_slice
from holdfast.trainer.models.decoder.norms import Queues
from holdfast.trainer.models.decoder.section import DecoderConfig, ExpertDesign

Decisions = dict[int, Tensor]
"""By slice, the experts that its tokens have chosen: int64[tokens, experts per token]."""


class _Expert(nn.Module):
    """The MLP of one expert of each of this rank's parts."""

    def __init__(self, hidden: int, intermediate: int, parts: int) -> None:
        super().__init__()
        self.gate_up = nn.ParameterList(torch.empty(2 * intermediate, hidden) for _ in range(parts))
        self.down = nn.ParameterList(torch.empty(hidden, intermediate) for _ in range(parts))


class Experts(nn.Module):
    """The experts of a layer that this rank's parts have, and the router of all."""

    def __init__(
        self,
        model: DecoderConfig,
        design: ExpertDesign,
        layer: int,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        shared: nn.Module | None = None,
    ) -> None:
        """Local.

        Args:
            shared: the MLP that all tokens go to beside their experts.
        """
        super().__init__()
        self._tp, self._queue, self._design, self._layer = tp, queue, design, layer
        router = design.router
        self._router = Router(
            design.per_token,
            router.score,
            router.normalizes,
            router.scale,
            router.groups,
            router.group_limit,
        )
        self.router = nn.Parameter(torch.empty(design.count, model.hidden))
        self.router_bias: nn.Parameter | None = None
        if router.bias_speed is not None:
            self.router_bias = nn.Parameter(torch.empty(design.count))
        self.shared = shared
        parts = len(tp.own_parts)
        own = [
            _Expert(model.hidden, design.intermediate, parts)
            for _ in range(design.count // tp.parts)
        ]
        self.experts = nn.ModuleList(own)
        self._gate_up = [expert.gate_up for expert in own]
        self._down = [expert.down for expert in own]

    def forward(
        self,
        value: Tensor,
        context: MicroBatchContext,
        number: int,
        queues: Queues,
        decisions: Decisions,
    ) -> Tensor:
        """Of slice `number`.

        Args:
            decisions: the choices of slices that are computed again; others are added.
        """
        flat = value.flatten(0, 1)
        is_new = number not in decisions
        choices = self._choices(value, number, decisions.get(number))
        decisions[number] = choices.experts
        counted = self._counted(context, number, value)
        if context.training and (is_new or self.router_bias is not None):
            loads = self._loads(choices, counted)
            if is_new:
                self._note(loads, context, number)
            choices = self._with_loads(choices, loads, number)
        weights = self._with_losses(choices, value, counted, context)
        count, per_token = self._design.count, self._design.per_token
        way = dispatch(choices.experts, count, self._tp.group, value.dtype)
        gate_up, down = (
            [expert[part] for part in range(len(self._tp.own_parts)) for expert in of_kind]
            for of_kind in (self._gate_up, self._down)
        )
        rows = way.to_experts(flat, per_token)
        made = expert_products(rows, way.counts, gate_up, down, self._queue.of(number))
        found = way.to_tokens(made, weights).view_as(value)
        if self.shared is None:
            return found
        return found + self.shared(value, context, number, queues, decisions)

    def _choices(self, value: Tensor, number: int, kept: Tensor | None) -> Choices:
        """The choices of this rank's tokens. Those of each part are decided by themselves."""
        parts = len(self._tp.own_parts)
        known = [None] * parts if kept is None else kept.chunk(parts)
        bias = None if self.router_bias is None else self.router_bias.detach()
        found = []
        for place, (tokens, before) in enumerate(zip(value.chunk(parts), known, strict=True)):
            weight = in_slice(self.router, self._queue.of(number * parts + place))
            logits = logits_of(tokens.flatten(0, 1), weight)
            found.append(self._router.choose(logits, bias, before))
        if parts == 1:
            return found[0]
        return Choices(*(torch.cat(values) for values in zip(*map(_fields, found), strict=True)))

    def _loads(self, choices: Choices, counted: Tensor) -> list[Tensor]:
        """How many tokens of each own part each expert has, padding left out: int64[experts]."""
        parts = len(self._tp.own_parts)
        of_parts = counted // (len(choices.experts) // parts)
        return [
            torch.bincount(
                choices.experts[counted[of_parts == place]].flatten(), minlength=self._design.count
            )
            for place in range(parts)
        ]

    def _note(self, loads: Sequence[Tensor], context: MicroBatchContext, number: int) -> None:
        for part, load in zip(self._tp.own_parts, loads, strict=True):
            key = TokensKey(self._layer, part, context.micro_batch, number)
            context.loads[key] = load

    def _with_loads(self, choices: Choices, loads: Sequence[Tensor], number: int) -> Choices:
        """The choices, with each part's loads as the gradient of the router's bias."""
        if self.router_bias is None:
            return choices
        weights = choices.weights
        for place, load in enumerate(loads):
            queue = self._queue.of(number * len(loads) + place)
            weights = add_gradient(weights, self.router_bias, load * LOAD_UNIT, queue)
        return replace(choices, weights=weights)

    def _with_losses(
        self, choices: Choices, value: Tensor, counted: Tensor, context: MicroBatchContext
    ) -> Tensor:
        """The weights of the choices, with the router's own losses in their gradient."""
        design, router, weights = self._design, self._design.router, choices.weights
        if not context.training or not (router.aux_loss or router.z_loss):
            return weights
        length, sequences = value.shape[:2]
        rows = torch.arange(sequences, device=value.device).repeat(length)[counted]
        tokens = torch.bincount(rows, minlength=sequences)
        here = _some(choices, counted)
        places = (rows[:, None] * design.count + here.experts).flatten()
        counts = torch.bincount(places, minlength=sequences * design.count)
        both = torch.cat([tokens, counts])
        if self._tp.group is not None:
            self._tp.group.all_reduce(both).wait()
        tokens, counts = both.split([sequences, sequences * design.count])
        loss = choices.weights.new_zeros(())
        if router.aux_loss:
            balance = balance_loss(here, counts.view(sequences, design.count), rows, tokens)
            loss = loss + router.aux_loss * balance
        if router.z_loss:
            loss = loss + router.z_loss * here.logsumexp.square().sum()
        return add_loss(weights, loss, context.loss_gradient)

    def _counted(self, context: MicroBatchContext, number: int, value: Tensor) -> Tensor:
        """The places of this rank's tokens that are no padding: int64, of the flat hidden state."""
        batch = context.batch
        length, sequences = value.shape[:2]
        if batch is None or batch.documents is None:
            return torch.arange(length * sequences, device=value.device)
        learned = batch.learned().t()[context.slices.tokens(number)]
        first = self._tp.index * length if self._tp.sequence_parallel else 0
        return learned[first : first + length].flatten().nonzero().flatten()


def _fields(choices: Choices) -> tuple[Tensor, ...]:
    return choices.experts, choices.weights, choices.shares, choices.logsumexp


def _some(choices: Choices, places: Tensor) -> Choices:
    return Choices(*(values[places] for values in _fields(choices)))
