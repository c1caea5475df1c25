"""The display process: shows a run from its records, and outlives every worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.launch.processes import PASSED_ON, end_child, fork_child
from holdfast.parallel.errors import HoldfastError
from holdfast.parallel.output import is_event, json_lines, name_process, step_of
from holdfast.parallel.plan import Plan, plan_from_data
from holdfast.parallel.reading import open_regular
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import OffloadMetrics, RunConsole, SaveFailures, StepMetrics
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import plan_of

_POLL_S = 0.05
_END_S = 10.0
_TOLD = (
    "resume_note",
    "straggler",
    "relieved",
    "slow_link",
    "wrong_computation",
    "not_rewound",
)
"""The events whose message is shown."""
"""Seconds that the process may take to show the remaining records."""


@dataclass(slots=True)
class DisplayProcess:
    """The process that shows a run."""

    pid: int
    pipe: int
    errors: int
    """The standard error of the process that started it, as it was."""

    def close(self) -> None:
        """Show the remaining records, and wait for the process to end.

        It is killed if it does not end in time: the terminal may be stopped.
        """
        sys.stderr.flush()
        os.dup2(self.errors, 2)
        os.close(self.errors)
        os.close(self.pipe)
        end_child(self.pid, _END_S)


def start_display(config: RunConfig, run: RunDirectory) -> DisplayProcess:
    """Fork the display process of a run. The caller must not have threads.

    Until it is closed, it also says what this process, and those that it forks, write to standard
    error: above the panel of a terminal, and in the log of the console.
    """
    begin = [path.stat().st_size if path.exists() else 0 for path in (run.events, run.metrics)]
    reader, writer = os.pipe()
    told, telling = os.pipe()

    def body() -> int:
        name_process("panel")
        os.close(writer)
        os.close(telling)
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)
        _follow(config, run, reader, told, begin)
        return 0

    pid = fork_child(body)
    os.close(reader)
    os.close(told)
    errors = os.dup(2)
    os.dup2(telling, 2)
    os.close(telling)
    return DisplayProcess(pid, writer, errors)


class _Lines:
    """The whole lines that come through a pipe."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor, self._begun = descriptor, b""

    def come(self) -> list[str]:
        """The lines since the last call. Does not wait."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._descriptor, 1 << 16):
                self._begun += piece
        *lines, self._begun = self._begun.split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def _follow(config: RunConfig, run: RunDirectory, ended: int, told: int, begin: list[int]) -> None:
    os.set_blocking(ended, False)
    view, lines = _RunView(config, run, plan_of(config)), _Lines(told)
    events, metrics = _Follower(run.events, begin[0]), _Follower(run.metrics, begin[1])
    is_over = False
    while True:
        for said in lines.come():
            view.console.display.tell(said)
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
            view.console.close()
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


class _RunView:
    """What a run's records say, on its console."""

    def __init__(self, config: RunConfig, run: RunDirectory, first: Plan) -> None:
        """Start the display.

        Args:
            first: the plan of all ranks.
        """
        self._first, self._last = first, 0
        self._failures = SaveFailures()
        self.console = RunConsole(run, config, first)

    def step(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl; a step that is repeated is shown once."""
        if line["step"] <= self._last:
            return
        fields = dict(line)
        if "offload" in line:
            fields["offload"] = OffloadMetrics(**line["offload"])
        if line["grad_norm"] is None:
            fields["grad_norm"] = float("nan")
        evaluated = fields.get("validation", {})
        fields["validation"] = {n: float("nan") if v is None else v for n, v in evaluated.items()}
        metrics = StepMetrics(**fields)
        self.console.step(metrics, memory_gib=None, mfu=None)
        self._last = metrics.step

    def event(self, line: dict[str, Any]) -> None:
        """Show an event."""
        name, note = line["event"], self.console.display.note
        if name == "node_refused":
            note(f"node {line['node']} is not let in: {line['reason']}")
        elif name == "machine_error":
            note(f"node {line['node']}: {line['what']}")
        elif name == "rank_lost":
            note(f"rank {line['rank']} is lost: {line['cause']}")
        elif name in ("recovered", "generation"):
            if not any(line[kind] for kind in ("lost", "left", "joined", "placed")):
                return
            plan, told = plan_from_data(self._first, line["plan"]), describe_change(line)
            if line["lost"]:
                self.console.recovered(line["lost"], repeated=line["replayed_steps"])
            self.console.display.change(plan)
            note(told)
        elif name == "checkpoint_committed":
            self._failures.succeeded(line["tier"])
            note(
                f"checkpoint of step {line['step']} ({line['tier']}): {line['bytes'] / 2**20:,.0f} "
                f"MiB in {line['total_s']:.2f} s"
            )
        elif name == "offload_failed":
            note(f"rank {line['rank']} keeps activations in memory: {line['reason']}")
        elif name == "checkpoint_failed":
            if told := self._failures.failed(line["tier"], line["step"], line["error"]):
                note(told)
        elif name in _TOLD or (name == "data_opened" and not line["step"]):
            note(line["message"])
        elif name == "rewound":
            self._last = min(self._last, line["step"])
            note(line["message"])
        elif name == "step_skipped":
            note(line["reason"])
        elif name == "run_finished":
            if summary := self._failures.summary():
                note(summary)
            self.console.finish(line["parameter_digest"], line["total_s"])


def describe_change(line: dict[str, Any]) -> str:
    """A membership change in one line, from its event."""
    who = []
    if line["lost"]:
        who.append(f"without {_numbered(line['lost'])}")
    if line["left"]:
        who.append(_told(line["left"], "has left", "have left"))
    waiting = [rank for rank in line["joined"] if rank in line["waiting"]]
    at_once = [rank for rank in line["joined"] if rank not in waiting]
    if at_once:
        who.append(_told(at_once, "has joined", "have joined"))
    if waiting:
        who.append(_told(waiting, "joins as a shadow", "join as shadows"))
    if line["placed"]:
        who.append(_told(line["placed"], "takes its place", "take their places"))
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


def _told(ranks: Sequence[int], of_one: str, of_several: str) -> str:
    return f"{_numbered(ranks)} {of_one if len(ranks) == 1 else of_several}"


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
