"""A layer's experts (Shazeer et al. 2017): a router, and an MLP for each expert.

A rank has the experts of its parts, as it has the features of an MLP, or those that the plan gives
it. Each expert's tokens of a slice are computed as one, wherever they come from. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from holdfast.parallel.expert_parallel import (
    LOAD_UNIT,
    Arriving,
    Choices,
    Router,
    add_gradient,
    add_loss,
    balance_loss,
    dispatch,
    expert_products,
    logits_of,
)
from holdfast.parallel.pipeline import (
    ExpertTeam,
    MicroBatchContext,
    TokensKey,
    WeightGradientQueue,
)
from holdfast.parallel.tensor_parallel import TensorParallel, in_slice
from holdfast.trainer.models.decoder.norms import Queues
from holdfast.trainer.models.decoder.section import DecoderConfig, ExpertDesign

Decisions = dict[int, Tensor]
"""By slice, the experts that its tokens have chosen: int64[tokens, experts per token]."""


class _Expert(nn.Module):
    """The MLP of one expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate, hidden))
        self.down = nn.Parameter(torch.empty(hidden, intermediate))


class Experts(nn.Module):
    """The experts of a layer that this rank has, and the router of all."""

    def __init__(
        self,
        model: DecoderConfig,
        design: ExpertDesign,
        layer: int,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        own: Sequence[int],
        shared: nn.Module | None = None,
    ) -> None:
        """Local.

        Args:
            own: the experts of this rank.
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
        self._own = {expert: _Expert(model.hidden, design.intermediate) for expert in own}
        self.experts = nn.ModuleDict({str(expert): of for expert, of in self._own.items()})

    def forward(
        self,
        values: Sequence[Tensor],
        context: MicroBatchContext,
        queues: Sequence[Queues],
        decisions: Decisions,
    ) -> list[Tensor]:
        """Of the slices of a passage. Collective over the team of `context`.

        Args:
            values: where this rank only hosts experts, float[0, hidden], and so is the result.
            decisions: the choices of slices that are computed again; others are added.
        """
        if context.hosts_only:
            return [self._host(values[0], context)]
        routed = [
            self._routed(value, context, number, decisions)
            for number, value in zip(context.slices.own, values, strict=True)
        ]
        chosen = [experts for experts, _ in routed]
        weights = _in_one([of_slice for _, of_slice in routed])
        flat = _in_one([value.flatten(0, 1) for value in values])
        arriving, shared = self._dispatched(flat, chosen, context), None
        if self.shared is not None:  # beside the tokens' way
            shared = self.shared(values, context, queues, decisions)
        found = self._made(arriving, weights).split([len(of_slice) for of_slice in chosen])
        mixed = [rows.view_as(value) for rows, value in zip(found, values, strict=True)]
        if shared is None:
            return mixed
        return [of_experts + of_all for of_experts, of_all in zip(mixed, shared, strict=True)]

    def _host(self, value: Tensor, context: MicroBatchContext) -> Tensor:
        """Have the experts here work for the tokens of others alone."""
        width = torch.promote_types(value.dtype, torch.float32)
        weights = value.new_empty(0, self._design.per_token, dtype=width)
        return self._made(self._dispatched(value, [], context), weights)

    def _dispatched(
        self, flat: Tensor, chosen: Sequence[Tensor], context: MicroBatchContext
    ) -> Arriving:
        """The tokens on their way to the experts that they chose: float[tokens, hidden]."""
        design, layer = self._design, self._layer
        slices = [(context.micro_batch, number) for number in context.slices.own[: len(chosen)]]
        team = context.experts
        if team is None:
            team = ExpertTeam.of_parts(self._tp.group, layer, design.count, len(slices))
        way = dispatch(chosen, slices, design.per_token, design.count, team, layer, flat)
        return way.to_experts(flat)

    def _made(self, arriving: Arriving, weights: Tensor) -> Tensor:
        """What the experts make of the tokens, back at these: float[tokens, hidden]."""
        way = arriving.way
        own = {expert: (module.gate_up, module.down) for expert, module in self._own.items()}
        made = expert_products(arriving.rows(), way.work, own, self._queue, way.elsewhere)
        return way.to_tokens(made, weights)

    def _routed(
        self, value: Tensor, context: MicroBatchContext, number: int, decisions: Decisions
    ) -> tuple[Tensor, Tensor]:
        """The experts of a slice's tokens, and their weights: [tokens, experts per token]."""
        is_new = number not in decisions
        choices = self._choices(value, number, decisions.get(number))
        decisions[number] = choices.experts
        counted = self._counted(context, number, value)
        if context.training and (is_new or self.router_bias is not None):
            loads = self._loads(choices, counted)
            if is_new:
                self._note(loads, context, number)
            choices = self._with_loads(choices, loads, number)
        return choices.experts, self._with_losses(choices, value, counted, context)

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


def _in_one(of_slices: Sequence[Tensor]) -> Tensor:
    """The rows of all slices; those of a single one are not copied."""
    return of_slices[0] if len(of_slices) == 1 else torch.cat(list(of_slices))


def _fields(choices: Choices) -> tuple[Tensor, ...]:
    return choices.experts, choices.weights, choices.shares, choices.logsumexp


def _some(choices: Choices, places: Tensor) -> Choices:
    return Choices(*(values[places] for values in _fields(choices)))
