"""The executor: runs one rank's program of a step over its model chunks.

It knows neither the schedule nor the model: actions come as data, chunks behind a protocol. Every
message has a tag: its direction, chunk, micro-batch and stretch. Receives are posted ahead of their
use, in the order in which the peer sends. Sends are waited for only at the end of the step.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from holdfast.parallel.comm import ACTIVATIONS, Communicator, Handle
from holdfast.parallel.offload import Offloader, SavedOfProgram
from holdfast.parallel.pipeline.model_chunk import Passage
from holdfast.parallel.schedules import (
    RECEIVES,
    SENDS,
    Action,
    ActionKey,
    Op,
    Program,
    matching_receive,
)

_POSTED_AHEAD = 4
"""Receives in flight beyond the one being waited for: enough to hide the rendezvous of a message,
few enough to keep their buffers small."""


class ChunkRunner(Protocol):
    """The operations of one model chunk on `Passage`s of the step."""

    def forward(self, passage: Passage, value: Tensor | None) -> Tensor | None:
        """The chunk's output for its input (None for the first).

        The last chunk keeps its loss: None. With a negative micro-batch, a chunk's experts compute
        for other ranks alone, without input or output; and so backwards.
        """
        ...

    def backward(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        """Compute input and weight gradients.

        Returns the input's gradient (None from the first chunk).
        """
        ...

    def backward_input(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        """Compute and return the input's gradient only; `backward_weight` computes the others."""
        ...

    def backward_weight(self, passage: Passage) -> None: ...


@dataclass(frozen=True, slots=True)
class MessageShape:
    """The form of a hidden state between two chunks, and of its messages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows_of: Callable[[int, bool], Sequence[slice] | None] = lambda peer, sends: None
    """(peer, whether this rank sends) -> the rows of the hidden state in their messages; None: all,
    as between replicas of one size."""

    def cut(self, value: Tensor, peer: int) -> Tensor:
        """The part of a hidden state that `peer` receives."""
        rows = self.rows_of(peer, True)
        return value if rows is None else torch.cat([value[row] for row in rows])

    def buffer(self, peer: int) -> Tensor:
        """The memory of a message from `peer`."""
        rows, shape = self.rows_of(peer, False), self.shape
        if rows is not None:
            shape = (sum(row.stop - row.start for row in rows), *shape[1:])
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def joined(self, before: Tensor | None, message: Tensor, peer: int) -> Tensor:
        """The hidden state with a message that has arrived, and those that came before it."""
        rows = self.rows_of(peer, False)
        if rows is None:
            return message
        whole = before
        if whole is None:
            whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        start = 0
        for row in rows:
            whole[row] = message[start : (start := start + row.stop - row.start)]
        return whole


@dataclass(slots=True)
class ActionTimes:
    """The times of each action of a step, in seconds of `time.perf_counter`."""

    actions: list[Action] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    stops_s: list[float] = field(default_factory=list)

    def extend(self, later: ActionTimes) -> None:
        """Add those of another program, which ran later."""
        self.actions += later.actions
        self.starts_s += later.starts_s
        self.stops_s += later.stops_s


@dataclass(slots=True)
class _Posted:
    handle: Handle
    buffer: Tensor


def message_tag(receive: Action, micro_batches: int, stretches: int = 1) -> int:
    """The tag of the message for a receive action; unique within a step.

    Args:
        micro_batches: those of the whole step, over all replicas.
        stretches: those of a sequence.
    """
    direction = 0 if receive.op is Op.RECEIVE_FORWARD else 1
    number = receive.chunk * micro_batches + receive.micro_batch
    number = number * stretches + (receive.stretch or 0)
    return ACTIVATIONS.tag(number * 2 + direction)


def receive_order(program: Program, peers: Mapping[int, Program], rank: int) -> dict[Action, int]:
    """For each receive of `program`, its position among the sender's sends to this rank."""
    order: dict[Action, int] = {}
    for peer, peer_program in peers.items():
        sends = (a for a in peer_program if a.peer == rank and a.op in SENDS)
        for place, send in enumerate(sends):
            order[matching_receive(send, peer)] = place
    return {a: order[a] for a in program if a.op in RECEIVES}


def _at(chunk: int, passage: Passage) -> ActionKey:
    return chunk, passage.micro_batch, passage.stretch


class Executor:
    """Runs programs over chunks. Local, apart from the messages in the program."""

    def __init__(
        self,
        chunks: Mapping[int, ChunkRunner],
        last_chunk: int,
        message: MessageShape,
        comm: Communicator,
        micro_batches: int,
        offloader: Offloader | None = None,
        stretches: int = 1,
    ) -> None:
        """Nothing is run yet.

        Args:
            chunks: this rank's chunks by global chunk index.
            last_chunk: the model's last chunk, whose output is the loss.
            message: the form of every activation and gradient that chunks send each other.
            comm: the group that contains the ranks of all chunks.
            micro_batches: the number of micro-batches of the whole step, over all replicas.
            offloader: stores the tensors that forward passes save until their backward passes;
                None: none.
            stretches: the parts in which a sequence passes the chunks.
        """
        self._chunks = chunks
        self._last_chunk = last_chunk
        self._message = message
        self._comm = comm
        self._tag = partial(message_tag, micro_batches=micro_batches, stretches=stretches)
        self._offloader = offloader
        self._awaiting_weight_gradient: dict[ActionKey, None] = {}
        """What has passed its chunk with its input gradient alone, in order."""

    def run_weight_parts(self) -> None:
        """Compute the weight gradients that an interrupted step left; they need no message."""
        for chunk, micro_batch, stretch in self._awaiting_weight_gradient:
            self._chunks[chunk].backward_weight(Passage(micro_batch, stretch))
        self._awaiting_weight_gradient.clear()

    def run(self, program: Program, order: Mapping[Action, int] | None = None) -> ActionTimes:
        """Run one step's program, without pauses for the cyclic garbage collector.

        Args:
            program: this rank's actions.
            order: the result of `receive_order`; the receives of one peer are posted in this order.
                None: in program order, which tagged transports allow.
        Returns:
            The times of the compute and message actions, for traces and metrics.
        Raises:
            PeerLost: a message failed.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._run(program, order)
        finally:
            if collects:
                gc.enable()

    def _run(self, program: Program, order: Mapping[Action, int] | None) -> ActionTimes:
        self._awaiting_weight_gradient.clear()
        times = ActionTimes()
        note = (times.actions.append, times.starts_s.append, times.stops_s.append)
        values: dict[ActionKey, Tensor | None] = {}
        gradients: dict[ActionKey, Tensor | None] = {}
        sends: dict[tuple[Op, ActionKey], list[Handle]] = defaultdict(list)
        last_send = {(a.op, a.key): a for a in program if a.op in SENDS}
        receives = _Receives(program, order, self)
        chunks, last = self._chunks, self._last_chunk
        saved = SavedOfProgram.of(program, self._offloader)
        for action in program:
            op, key = action.op, action.key
            chunk, passage = action.chunk, Passage(action.micro_batch, action.stretch)
            start = perf_counter()
            if op is Op.FORWARD:
                value = values.pop(key, None)
                with saved.forward(key):
                    output = chunks[chunk].forward(passage, value)
                if chunk != last and passage.micro_batch >= 0:
                    values[_at(chunk + 1, passage)] = output
                del value, output  # what waits for its backward pass may leave memory
            elif op is Op.BACKWARD or op is Op.BACKWARD_INPUT:
                saved.backward(key)
                runner = chunks[chunk]
                run = runner.backward if op is Op.BACKWARD else runner.backward_input
                gradient = run(passage, gradients.pop(key, None))
                if op is Op.BACKWARD_INPUT:
                    self._awaiting_weight_gradient[key] = None
                if chunk != 0 and passage.micro_batch >= 0:
                    gradients[_at(chunk - 1, passage)] = gradient
                del gradient
            elif op is Op.BACKWARD_WEIGHT:
                chunks[chunk].backward_weight(passage)
                self._awaiting_weight_gradient.pop(key, None)
            elif op is Op.RECEIVE_FORWARD:
                values[key] = self._received(action, values.get(key), receives)
            elif op is Op.RECEIVE_BACKWARD:
                gradients[key] = self._received(action, gradients.get(key), receives)
                # Peers that answer have long received the earlier sends: this frees them and does
                # not block.
                for handle in sends.pop((Op.SEND_FORWARD, key), ()):
                    handle.wait()
            else:
                found, at = (values, 1) if op is Op.SEND_FORWARD else (gradients, -1)
                place = _at(chunk + at, passage)
                sends[(op, key)].append(self._send(action, found[place]))
                if last_send[(op, key)] is action:
                    del found[place]
                receives.post_ahead()
            note[0](action)
            note[1](start)
            note[2](perf_counter())
        for handle in chain.from_iterable(sends.values()):
            handle.wait()
        saved.end()
        return times

    def _send(self, action: Action, tensor: Tensor | None) -> Handle:
        assert tensor is not None
        assert action.peer is not None
        tag = self._tag(matching_receive(action, action.peer))
        message = self._message.cut(tensor.detach(), action.peer).contiguous()
        return self._comm.send(message, action.peer, tag)

    def _received(self, action: Action, before: Tensor | None, receives: _Receives) -> Tensor:
        """The hidden state with the message of `action`, once that is here."""
        assert action.peer is not None
        return self._message.joined(before, receives.wait(action), action.peer)

    def post(self, action: Action) -> _Posted:
        """Begin to receive the message of `action`."""
        assert action.peer is not None
        buffer = self._message.buffer(action.peer)
        return _Posted(self._comm.receive(buffer, action.peer, self._tag(action)), buffer)


class _Receives:
    """Posts a program's receives ahead of their use, each peer's in the order of its sends."""

    def __init__(
        self, program: Program, order: Mapping[Action, int] | None, executor: Executor
    ) -> None:
        self._executor = executor
        self._upcoming: Sequence[Action] = [a for a in program if a.op in RECEIVES]
        self._posted: dict[Action, _Posted] = {}
        self._next = 0
        self._waited = 0
        self._by_peer: dict[int, list[Action]] = {}
        self._done_by_peer: dict[int, int] = {}
        for action in self._upcoming:
            assert action.peer is not None
            self._by_peer.setdefault(action.peer, []).append(action)
        for peer, actions in self._by_peer.items():
            self._done_by_peer[peer] = 0
            if order is not None:
                actions.sort(key=order.__getitem__)
        self.post_ahead()

    def wait(self, action: Action) -> Tensor:
        """The message that `action` needs; waits for it."""
        self._waited += 1
        if action not in self._posted:
            self.post_ahead()
        posted = self._posted.pop(action)
        posted.handle.wait()
        return posted.buffer

    def post_ahead(self) -> None:
        """Post the receives needed soon; called after sends, when no peer waits for this rank."""
        while self._next < min(self._waited + _POSTED_AHEAD, len(self._upcoming)):
            self._post_up_to(self._upcoming[self._next])
            self._next += 1

    def _post_up_to(self, action: Action) -> None:
        """Post `action` and all receives that its peer sends before it."""
        assert action.peer is not None
        queue = self._by_peer[action.peer]
        while action not in self._posted and self._done_by_peer[action.peer] < len(queue):
            following = queue[self._done_by_peer[action.peer]]
            self._posted[following] = self._executor.post(following)
            self._done_by_peer[action.peer] += 1
