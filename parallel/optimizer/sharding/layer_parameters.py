"""Shared parameters: a layer's parameters are in memory only while the layer is used.

Each rank of a shard group keeps its share of every layer. Before a layer's forward and backward
pass the keepers send their shares, some uses ahead, in the order that the program tells (as FSDP
does, Zhao et al. 2023). Owners update what they keep, and no other copy lasts. Exact-mode safe: the
values are copies.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import LAYERS, Communicator, Handle
from holdfast.parallel.optimizer.exchange import ParameterArrival, in_one, spread
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.sharding.shares import LayerShares, layer_shares
from holdfast.parallel.optimizer.spans import Span
from holdfast.parallel.plan import (
    LAYERS_AHEAD,
    Plan,
    ShardGroup,
    are_aligned,
    shard_group,
    use_order,
)
from holdfast.parallel.schedules import Program

_SENT_AHEAD = 4
"""The uses beyond a rank's own for which it sends. Others may be that far ahead of it."""


class _BeforeBackward(torch.autograd.Function):
    """Identity; calls a function before the backward pass of what has computed its inputs."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *gradients


def _no_experts(module: object, value: Tensor, context: object) -> Tensor:
    """The host of a layer without experts."""
    return value


@dataclass(frozen=True, slots=True)
class _Layer:
    """The memory of one layer's parameters; its storage is empty while the layer is not used."""

    values: Tensor
    """The layer's part of the flat index space."""
    bytes: int
    start: int
    """Its first element in that space."""

    def part(self, span: Span) -> Tensor:
        return self.values[span.start - self.start : span.stop - self.start]


@dataclass(slots=True)
class _Uses:
    """The uses of one program on each rank of the group, and how far this rank is."""

    orders: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By rank of the group, the layers that it uses, in order."""
    is_aligned: bool = False
    """Whether the ranks do the same things in the same order; see `are_aligned`."""
    begun: int = 0
    """This rank's uses so far."""
    posted: int = 0
    """The uses whose messages are received."""
    receives: deque[list[tuple[Handle, Tensor, tuple[Span, ...]]]] = field(default_factory=deque)
    """The messages of each use that is ahead, with their places."""
    served: int = 0
    """The uses for which this rank has sent its share to all others."""
    sends: list[Handle] = field(default_factory=list)


class LayerParameters:
    """The parameters of one rank's layers, of which `ParameterBuffer.values` keeps a share.

    It belongs to the rank's modules, which wait here before they use their parameters. At most one
    layer is in memory as a whole. The training thread calls everything. It has an attribute for
    what belongs to the modules (layers), to the plan (rank, group, shares, connection), and to the
    running program (uses).
    """

    def __init__(
        self, buffer: ParameterBuffer, modules: Mapping[int, nn.Module], arrival: ParameterArrival
    ) -> None:
        """Give every parameter of `buffer` a place in its layer's memory, which is empty. Local.

        Args:
            modules: the module of each layer.
            arrival: awaits kept parameters that are on their way from their owners.
        """
        self._buffer, self._arrival = buffer, arrival
        parameters: dict[int, list[nn.Parameter]] = {}
        for segment in buffer.segments:
            parameters.setdefault(segment.layer, []).append(segment.parameter)
        self._layers = {layer: _lay_out(buffer, found) for layer, found in parameters.items()}
        self._resident: int | None = None
        self._plan: Plan | None = None
        self._rank = -1
        self._comm: Communicator | None = None
        self._group = ShardGroup(())
        self._aligned: dict[frozenset[int] | None, bool] = {}
        """By the micro-batches of a step, whether the ranks do the same in the same order."""
        self._shares: Mapping[int, LayerShares] = {}
        self._uses = _Uses()
        self._receiving: Callable[[], None] = lambda: None
        for layer, module in modules.items():
            module.register_forward_pre_hook(lambda *_, layer=layer: self.use(layer))
            module.register_forward_hook(partial(self._gated, layer))
            # A module that referred to itself would stay in memory when another replaces it.
            module.__dict__["host"] = partial(self._hosted, layer, weakref.ref(module))

    def connect(self, plan: Plan, rank: int, comm: Communicator) -> None:
        """Share with the ranks of a plan from now on. Local."""
        self.cancel()
        self._plan, self._rank, self._comm = plan, rank, comm
        group = shard_group(plan, rank, "parameters")
        self._group, self._aligned = group, {}
        self._shares = layer_shares(plan, rank, self._buffer, "parameters")

    def _gated(
        self, layer: int, module: object, inputs: object, outputs: list[Tensor]
    ) -> list[Tensor]:
        """A layer's outputs, whose backward pass begins with the use of the layer's parameters."""
        assert self._plan is not None
        if self._plan.layers[layer].forward_only or not outputs[0].requires_grad:
            return outputs
        return list(_BeforeBackward.apply(lambda: self.use(layer), *outputs))

    def _hosted(
        self, layer: int, module: weakref.ref[nn.Module], value: Tensor, context: object
    ) -> Tensor:
        """Use the layer's parameters, also where the rank only hosts experts: as the others do."""
        self.use(layer)
        here = module()
        host = getattr(type(here), "host", _no_experts)
        return self._gated(layer, here, value, [host(here, value, context)])[0]

    def begin(
        self,
        program_of: Callable[[int], Program],
        receiving: Callable[[], None] = lambda: None,
        only: frozenset[int] | None = None,
    ) -> None:
        """Begin a program; the first parameters are on their way from now on. Local.

        Args:
            program_of: returns the program of each rank.
            receiving: called once parameters of later uses are on their way as well.
            only: the micro-batches that are computed; None: all.
        Raises:
            PeerLost: an owner is gone.
        """
        plan = self._plan
        assert plan is not None
        if only not in self._aligned:
            self._aligned[only] = are_aligned(plan, self._group, only)
        orders = {peer: use_order(plan, program_of(peer)) for peer in self._group.ranks}
        self._uses = _Uses(orders, self._aligned[only])
        self._receiving = receiving
        self._receive_ahead()
        self._send_ahead()

    def use(self, layer: int) -> None:
        """Have a layer's parameters in memory, and no other's.

        Raises:
            PeerLost: a keeper is gone.
        """
        if layer == self._resident:
            return
        self._release()
        uses = self._uses
        order = uses.orders.get(self._rank, ())
        if uses.begun == len(order) or order[uses.begun] != layer:
            raise RuntimeError(f"layer {layer} is used where the program uses no such layer")
        uses.begun += 1
        self._receive_ahead()
        self._send_ahead()
        arrived = uses.receives.popleft()
        for handle, _, _ in arrived:
            handle.wait()
        found, share = self._layers[layer], self._shares[layer]
        self._arrival.use(share.parameters)
        found.values.untyped_storage().resize_(found.bytes)
        self._resident = layer
        with torch.no_grad():
            for span in (*share.shares.get(self._rank, ()), *share.whole):
                found.part(span).copy_(self._buffer.part(span.start, span.stop))
            for _, message, spans in arrived:
                spread(message, [found.part(span) for span in spans])
        if uses.begun == 1:
            self._receiving()

    def _receive_ahead(self) -> None:
        """Begin to receive the parameters of the uses that follow."""
        uses, comm = self._uses, self._comm
        assert comm is not None
        order = uses.orders[self._rank]
        while uses.posted < min(len(order), uses.begun + LAYERS_AHEAD):
            share, messages = self._shares[order[uses.posted]], []
            for keeper in self._others():
                spans = share.shares.get(keeper, ())
                if spans:
                    message = self._buffer.values.new_empty(share.elements(keeper))
                    tag = LAYERS.wrapped(uses.posted)
                    messages.append((comm.receive(message, keeper, tag), message, spans))
            uses.receives.append(messages)
            uses.posted += 1

    def _others(self) -> Sequence[int]:
        """The other ranks of the group, each rank beginning with the one behind it."""
        ranks = self._group.ranks
        place = ranks.index(self._rank)
        return ranks[place + 1 :] + ranks[:place]

    def _send_ahead(self, *, all_uses: bool = False) -> None:
        """Send this rank's share to the others, for their uses up to some beyond its own."""
        uses, comm = self._uses, self._comm
        assert comm is not None
        last = max(map(len, uses.orders.values()), default=0)
        if uses.is_aligned and not all_uses:
            last = min(last, uses.begun + _SENT_AHEAD)
        while uses.served < last:
            for peer in self._others():
                order = uses.orders[peer]
                if uses.served >= len(order):
                    continue
                share = self._shares[order[uses.served]]
                spans = share.shares.get(self._rank, ())
                if spans:
                    self._arrival.use(share.parameters)
                    message = self._message(share, spans)
                    uses.sends.append(comm.send(message, peer, LAYERS.wrapped(uses.served)))
            uses.served += 1

    def _message(self, share: LayerShares, spans: Sequence[Span]) -> Tensor:
        """This rank's share of a layer: a view, or a copy where its experts lie between."""
        if not share.whole:
            return self._buffer.kept.run(self._buffer.values, spans)
        return in_one([self._buffer.part(span.start, span.stop) for span in spans])

    def _release(self) -> None:
        """Free the memory of the layer that was used last."""
        if self._resident is not None:
            self._layers[self._resident].values.untyped_storage().resize_(0)
            self._resident = None

    def end(self) -> None:
        """After this rank's last use: free its memory, and send what others still use. Local."""
        self._release()
        self._send_ahead(all_uses=True)

    def finish(self) -> None:
        """Wait until the others have what they use; this rank's parameters may change then.

        Raises:
            PeerLost: a peer is gone.
        """
        for handle in self._uses.sends:
            handle.wait()
        self._uses = _Uses()

    def cancel(self) -> None:
        """Forget a program that was interrupted, once the communicators are aborted. Local."""
        self._release()
        self._uses = _Uses()


def _lay_out(buffer: ParameterBuffer, parameters: Sequence[nn.Parameter]) -> _Layer:
    """Give a layer's parameters a memory of their own, and empty it."""
    places = [buffer.place(parameter) for parameter in parameters]
    start, stop = min(first for first, _ in places), max(last for _, last in places)
    values = buffer.values.new_empty(stop - start)
    for (first, last), parameter in zip(places, parameters, strict=True):
        parameter.data = values[first - start : last - start].view(parameter.shape)
    size = values.untyped_storage().nbytes()
    values.untyped_storage().resize_(0)
    return _Layer(values, size, start)
