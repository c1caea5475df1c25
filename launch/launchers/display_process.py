"""The display process: shows a run from its records, and outlives every worker."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from holdfast.launch.processes import PASSED_ON, end_child, fork_child
from holdfast.parallel.errors import HoldfastError
from holdfast.parallel.output import is_event, json_lines, step_of
from holdfast.parallel.plan import Plan, plan_from_data
from holdfast.parallel.reading import open_regular
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import (
    Display,
    OffloadMetrics,
    ProgressLine,
    SaveFailures,
    described,
    duration,
)
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import plan_of

_POLL_S = 0.05
_END_S = 10.0
"""Seconds that the process may take to show the remaining records."""
_RECENT = 20


@dataclass(slots=True)
class DisplayProcess:
    """The process that shows a run."""

    pid: int
    pipe: int

    def close(self) -> None:
        """Show the remaining records, and wait for the process to end.

        It is killed if it does not end in time: the terminal may be stopped.
        """
        os.close(self.pipe)
        end_child(self.pid, _END_S)


def start_display(config: RunConfig, run: RunDirectory) -> DisplayProcess:
    """Fork the display process of a run. The caller must not have threads."""
    begin = [path.stat().st_size if path.exists() else 0 for path in (run.events, run.metrics)]
    reader, writer = os.pipe()

    def body() -> int:
        os.close(writer)
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)
        _follow(config, run, reader, begin)
        return 0

    pid = fork_child(body)
    os.close(reader)
    return DisplayProcess(pid, writer)


def _follow(config: RunConfig, run: RunDirectory, ended: int, begin: list[int]) -> None:
    os.set_blocking(ended, False)
    view = _RunView(config, run, plan_of(config))
    events, metrics = _Follower(run.events, begin[0]), _Follower(run.metrics, begin[1])
    is_over = False
    while True:
        found = [line for line in events.lines() if is_event(line)]
        for line in found:
            if line["event"] != "run_finished":
                _show(view.event, line)
        for line in metrics.lines():
            if step_of(line):
                _show(view.step, line)
        for line in found:
            if line["event"] == "run_finished":
                _show(view.event, line)
        try:
            if os.read(ended, 1) == b"":
                is_over = True
        except BlockingIOError:
            pass
        if is_over and not found:
            view.display.close()
            return
        time.sleep(0.01 if is_over else _POLL_S)


def _show(call: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
    """Show a line; one that lacks what it should have is left out."""
    with contextlib.suppress(KeyError, TypeError, ValueError, HoldfastError):
        call(line)


class _Follower:
    """The lines that are added to a file of JSON lines."""

    def __init__(self, path: Path, position: int) -> None:
        self._path, self._position = path, position
        self._inode = path.stat().st_ino if path.exists() else 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines since the last call.

        Torn and foreign ones are left out. If the file was rewritten, they begin at about the same
        position in it.
        """
        try:
            content = self._content()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        for _, record in json_lines(whole):
            if record is not None:
                yield record

    def _content(self) -> bytes:
        """The content since the position, which goes back in a file that was rewritten."""
        with open_regular(self._path) as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode or file.seek(0, os.SEEK_END) < self._position:
                file.seek(0)
                self._position = file.read(self._position).rfind(b"\n") + 1
                self._inode = inode
            file.seek(self._position)
            return file.read()


@dataclass(slots=True)
class _RunView:
    config: RunConfig
    run: RunDirectory
    first: Plan
    display: Display = field(init=False)
    losses: list[float] = field(default_factory=list)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    evaluated: dict[int, float] = field(default_factory=dict)
    last: int = 0
    failures: SaveFailures = field(default_factory=SaveFailures)

    def __post_init__(self) -> None:
        self.display = Display(self.run.root.name, self.first, every=self.config.log.every)
        self.display.start()

    def step(self, line: dict[str, Any]) -> None:
        if line["step"] <= self.last:
            return
        self.last = line["step"]
        self.losses.append(line["loss"])
        self.times.append(line["step_s"])
        recent = median(self.times)
        self.display.show(
            ProgressLine(
                step=line["step"],
                steps=self.config.train.steps,
                loss=line["loss"],
                grad_norm=line["grad_norm"] or float("nan"),
                lr=line["lr"],
                tokens_per_s=line["tokens_per_s"] * line["step_s"] / recent,
                left_s=(self.config.train.steps - line["step"]) * recent,
                memory_gib=None,
                eval_loss=self.evaluated.get(line["step"]),
                mfu=None,
                offload=described(OffloadMetrics(**line["offload"])) if "offload" in line else "",
            )
        )

    def event(self, line: dict[str, Any]) -> None:
        name = line["event"]
        if name == "evaluated":
            self.evaluated[line["step"]] = line["loss"]
        elif name == "rank_lost":
            self.display.note(f"rank {line['rank']} is lost: {line['cause']}")
        elif name in ("recovered", "generation"):
            if not any(line[kind] for kind in ("lost", "left", "joined", "placed")):
                return
            self.display.change(plan_from_data(self.first, line["plan"]))
            self.display.note(describe_change(line))
        elif name == "checkpoint_committed":
            self.failures.succeeded(line["tier"])
            self.display.note(
                f"checkpoint of step {line['step']} ({line['tier']}): {line['bytes'] / 2**20:,.0f} "
                f"MiB in {line['total_s']:.2f} s"
            )
        elif name == "offload_failed":
            self.display.note(f"rank {line['rank']} keeps activations in memory: {line['reason']}")
        elif name == "checkpoint_failed":
            if told := self.failures.failed(line["tier"], line["step"], line["error"]):
                self.display.note(told)
        elif name == "resume_note":
            self.display.note(line["message"])
        elif name == "step_skipped":
            self.display.note(line["reason"])
        elif name == "run_finished":
            self.finish(line)

    def finish(self, line: dict[str, Any]) -> None:
        if summary := self.failures.summary():
            self.display.note(summary)
        losses = self.losses or [float("nan")]
        self.display.finish(
            [
                ("steps", f"{line['steps']} in {duration(line['total_s'])}"),
                ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"),
                ("parameters", f"sha256 {line['parameter_digest'][:16]}"),
                ("run", str(self.run.root)),
            ]
        )


def describe_change(line: dict[str, Any]) -> str:
    """A membership change in one line, from its event."""
    who = []
    if line["lost"]:
        who.append(f"without rank {', '.join(map(str, line['lost']))}")
    if line["left"]:
        who.append(f"rank {', '.join(map(str, line['left']))} has left")
    waiting = [rank for rank in line["joined"] if rank in line["waiting"]]
    at_once = [rank for rank in line["joined"] if rank not in waiting]
    if at_once:
        who.append(f"rank {', '.join(map(str, at_once))} has joined")
    if waiting:
        who.append(f"rank {', '.join(map(str, waiting))} joins as a shadow")
    if line["placed"]:
        who.append(f"rank {', '.join(map(str, line['placed']))} takes its place")
    again = (
        ""
        if line["from_checkpoint"] is None
        else f", from the checkpoint of step {line['from_checkpoint']}"
    )
    noticed = f"noticed in {1000 * line['notice_s']:.0f} ms, " if line["notice_s"] else ""
    return (
        f"generation {line['generation']}: {', '.join(who) or 'goes on'}{again}; {noticed}agreed "
        f"in {1000 * line['agree_s']:.0f} ms, connected in {1000 * line['edit_s']:.0f}, "
        f"{line['moved_bytes'] / 2**20:.1f} MiB moved in {1000 * line['move_s']:.0f}"
    )
