"""Slow links: what messages between ranks take, beside the usual for their kind.

In a step messages share links and processors with others, so their times tell that something is
slow rather than where. What seems slow in two windows in a row is therefore tried: a few messages
go over several strides, one at a time. What is slow then, too, is reported; nothing else is done
about it. Trials take a fixed share of the time at most.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace
from time import perf_counter

from holdfast.parallel.comm import SlowLink, Window, delays, probe, slow_links, window_of
from holdfast.trainer.step import Training

_LEAST_S = 0.002
_LEAST_SHARE = 0.01
"""What costs less than this of a step, or than these seconds, is not slow."""
_MOST_TRYING = 0.005
"""The share of the time that trials may take."""
_LEAST_TRIAL_S = 0.01
"""Seconds by which the messages of a trial over one link take longer if it is slow; a processor
that is late now and then makes less."""
_TRIAL_MESSAGE_S = 0.005
"""What a message of a trial usually takes."""
_TRIAL_BYTES = (1 << 19, 1 << 24)
"""Its size, at least and at most: more than what a network lets pass before it holds to its rate.
"""

logger = logging.getLogger("holdfast.links")

_Place = tuple[str, int | None, int | None]


class LinkClock:
    """The windows of message times of one rank, and the slow links. Local but for `compare`."""

    def __init__(self) -> None:
        self._since: int | None = None
        self._steps = 0
        self._shares_clock = False
        """Whether all ranks are on one machine, as the last window has shown."""
        self._suspects = False
        """Whether something seemed slow in the last window."""
        self._trial_s = 0.0
        """What the last trial took on this rank."""
        self._spared_s = 0.0
        """The time of all steps since then, as all ranks know it."""
        self._told: frozenset[_Place] = frozenset()

    def start(self, training: Training) -> None:
        """Begin a step; the first begins the first window."""
        if self._since is None:
            self._since = training.groups.recorder.begin_window()
        self._steps += 1

    def compare(self, training: Training, factor: float) -> list[SlowLink]:
        """End a window, and begin the next. Collective over all ranks.

        Args:
            factor: how many times as long as usual the messages of a slow link take.
        Returns:
            What was slow when it was tried, and not when it was tried before, with the seconds a
            step by which messages took longer; equal on every rank.
        """
        steps = max(1, self._steps)
        found = self._window(training, self._since or 0)
        self._spared_s += steps * found.step_s
        least_s = max(_LEAST_S, _LEAST_SHARE * found.step_s)
        slow = [
            link
            for link in slow_links(delays(found.messages), factor)
            if link.excess_s / steps > least_s
        ]
        news: list[SlowLink] = []
        is_due = found.trial_s <= _MOST_TRYING * self._spared_s
        if slow and self._suspects and is_due:
            rates = [message.bytes / message.seconds for message in found.messages]
            size = int(_TRIAL_MESSAGE_S * statistics.median(rates))
            size = min(max(size, _TRIAL_BYTES[0]), _TRIAL_BYTES[1])
            excess_s = max(link.excess_s for link in slow) / steps
            news = [
                replace(link, excess_s=excess_s)
                for link in self._tried(training, slow, factor, size)
            ]
        self._suspects, self._steps = bool(slow), 0
        self._since = training.groups.recorder.begin_window()
        return news

    def _window(self, training: Training, since: int) -> Window:
        """What all ranks know of their messages. Collective."""
        groups = training.groups
        found = window_of(
            groups.control,
            groups.recorder,
            since,
            training.rank,
            trial_s=self._trial_s,
            shares_clock=self._shares_clock,
        )
        self._shares_clock = found.shares_clock
        return found

    def _tried(
        self, training: Training, suspected: list[SlowLink], factor: float, size: int
    ) -> list[SlowLink]:
        """What is slow alone, too, and was not in the last trial. Collective.

        Args:
            size: of messages, in bytes; the same on all ranks.
        """
        began_s, groups = perf_counter(), training.groups
        ends = ((link.source, link.destination) for link in suspected)
        edges = [(a, b) for a, b in ends if a is not None and b is not None and a != b]
        since = groups.recorder.begin_window()
        probe(groups.world, edges, size, training.device)
        self._trial_s, self._spared_s = perf_counter() - began_s, 0.0
        found = self._window(training, since)
        slow = [
            link
            for link in slow_links(delays(found.messages), factor)
            if link.excess_s > _LEAST_TRIAL_S
        ]
        if not slow:
            logger.info("%s seemed slow, but is not when it is tried alone", suspected[0].place)
        told, self._told = self._told, frozenset(_place(link) for link in slow)
        return [link for link in slow if _place(link) not in told]


def _place(link: SlowLink) -> _Place:
    return link.side, link.source, link.destination
