"""The readers that test_fuzzed_readers.py tries, each with files or messages as it expects them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from holdfast.elastic.agreement import AcceptorFile, AcceptorState, Report
from holdfast.elastic.agreement.reports import report_from_data, report_to_data
from holdfast.elastic.channel import message_in
from holdfast.elastic.faults import FaultEffects, FaultInjector
from holdfast.elastic.generation import Identity, parse_identities
from holdfast.elastic.history import history_of
from holdfast.elastic.lighthouse import ages_in
from holdfast.elastic.membership_events import (
    MembershipEvent,
    event_from_data,
    event_to_data,
)
from holdfast.elastic.roll import Roll, RunEnd
from holdfast.launch.health.admission import WrittenHealth, read_health, require_health
from holdfast.launch.health.report import Check, HealthReport
from holdfast.launch.launchers.join_file import JoinInfo, is_under_way
from holdfast.launch.report import found_in, report_lines
from holdfast.parallel.comm.flight_recorder import FlightRecorder, parse_record
from holdfast.parallel.errors import ConfigError, MembershipError
from holdfast.parallel.files import write_own_file
from holdfast.parallel.layout import SharePlace
from holdfast.parallel.output import (
    Evidence,
    LastOperation,
    ThreadStack,
    rising_steps,
    set_foreign_lines_aside,
)
from holdfast.parallel.output.evidence.record import MemoryFacts, StackFrame, ThreadFacts
from holdfast.parallel.plan.serialization import plan_from_data, plan_to_data
from holdfast.parallel.reading import parse_json
from holdfast.trainer.elastic.worker_status import WorkerStatus, status_from_data, status_to_data
from holdfast.trainer.run.history import read_events
from holdfast.trainer.run.identity import IDENTITY, RunIdentity, read_identity
from holdfast.trainer.run.resume import Resume
from holdfast.trainer.run.run_directory import (
    RunAnswer,
    RunDirectory,
    read_error,
    told_run,
    write_error,
)
from holdfast.trainer.step.vote.progress import Outcome
from support.runs.plans import first_plan


@dataclass(frozen=True, slots=True)
class Reader:
    """A reader, and texts that it accepts."""

    read: Callable[[bytes], object]
    samples: tuple[bytes, ...]


def _value(content: bytes) -> Any:
    """The value in a message; what is none at all counts as refused."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise MembershipError(str(error)) from error


def _text(value: object) -> bytes:
    return json.dumps(value).encode()


def _messages() -> dict[str, Reader]:
    """What processes of a run tell each other."""
    replaced = Identity(3, 2)
    report = Report(
        replaced,
        AcceptorState(4, frozenset({Identity(0), replaced}), frozenset({Identity(0)})),
        lost=frozenset({Identity(1), Identity(2)}),
        node="a",
        store="a:1",
        held=4,
        step=7,
        phase="reduce",
        data={"installed": 3},
    )
    event = MembershipEvent("waiting", replaced, "a cause", 1.5, "a", 4, "0-1,3.2")
    outcome = Outcome(2.5, 1.0, 0, 0)
    status = WorkerStatus(
        3,
        4,
        7,
        6,
        5,
        outcome=outcome,
        included={(0, 2, 1): frozenset({0, 3})},
        inputs={SharePlace(1, 2): [0, 3]},
    )
    plan = first_plan()
    return {
        "report": Reader(
            lambda c: report_from_data(_value(c)),
            (_text(report_to_data(report)), _text(report_to_data(Report(Identity(0))))),
        ),
        "event": Reader(
            lambda c: event_from_data(_value(c)),
            (_text(event_to_data(event)),),
        ),
        "status": Reader(
            lambda c: status_from_data(_value(c)),
            (_text(status_to_data(status)),),
        ),
        "message": Reader(
            message_in,
            (
                _text({"kind": "committed", "step": 3}),
                _text({"kind": "event", "event": event_to_data(event)}),
                _text(
                    {
                        "kind": "generation",
                        "number": 4,
                        "store": "a:1",
                        "prefix": "p",
                        "members": "0-3,4.1",
                        "nodes": ["a", "b"],
                    }
                ),
            ),
        ),
        "identities": Reader(
            lambda c: parse_identities(c.decode(errors="replace")), (b"0-3,4.1,5-7", b"2")
        ),
        "plan": Reader(
            lambda c: plan_from_data(plan, _value(c)),
            (_text(plan_to_data(plan)), _text(plan_to_data(replace(plan, shadows=())))),
        ),
        "answer": Reader(
            told_run,
            (
                msgspec.json.encode(
                    RunAnswer(root="/r", resume=Resume(("a",), ("n",)), lighthouse="http://a:1")
                ),
            ),
        ),
        "status page": Reader(
            lambda c: ages_in(c.decode(errors="replace"), "run"),
            (b"Next quorum status\n run:0: seen 0.13s ago\n run:3.2: seen 1e-5s ago\n",),
        ),
    }


def _flight_record(content: bytes) -> object:
    try:
        return parse_record(content, content[::-1] if len(content) % 3 else content)
    except ValueError as error:
        raise MembershipError("it is no record") from error


def _record() -> bytes:
    with TemporaryDirectory() as folder:
        recorder = FlightRecorder(1, path=Path(folder) / "record", slots=4)
        number = recorder.post(recorder.group("grads"), "send", "send", 2, 100, 7)
        recorder.finished(number)
        return (Path(folder) / "record").read_bytes()


def file_readers(folder: Path) -> dict[str, Reader]:
    """The readers of a run's own small files, which lie in `folder`."""
    run = RunDirectory(folder)

    def reading(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        def body(content: bytes) -> object:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return read()

        return body

    acceptor, roll = AcceptorFile(folder, Identity(3)), Roll(folder / "roll")
    acceptor.write(AcceptorState(4, frozenset({Identity(0)}), frozenset({Identity(0)})))
    acceptor_text = (folder / "3.acceptor").read_bytes()
    roll.end(RunEnd(3, "it was stopped"))
    run.error(0).parent.mkdir(parents=True, exist_ok=True)
    write_error(run, 0, ConfigError("a reason"))
    write_own_file(folder / IDENTITY, b"{}")
    identity = RunIdentity("a" * 32, "b" * 64, str(folder))
    return {
        "acceptor": Reader(reading(folder / "3.acceptor", acceptor.read), (acceptor_text,)),
        "end of run": Reader(
            reading(folder / "roll" / "end.json", roll.ended),
            ((folder / "roll" / "end.json").read_bytes(),),
        ),
        "error of a rank": Reader(
            reading(run.error(0), lambda: read_error(run, 0)), (run.error(0).read_bytes(),)
        ),
        "health": Reader(
            reading(run.health, lambda: require_health([_NEW], read_health(run, "token"))),
            (msgspec.json.encode(WrittenHealth("token", (_NODE, _NODE))),),
        ),
        "identity": Reader(
            reading(folder / IDENTITY, lambda: read_identity(folder)),
            (msgspec.json.encode(identity),),
        ),
        "join file": Reader(
            reading(run.join_file, lambda: is_under_way(run, "token")),
            (msgspec.json.encode(JoinInfo("http://a:1", "token", 4, 6)),),
        ),
        "faults asked for": Reader(
            reading(run.chaos, lambda: _asked(run.chaos)),
            (_text({"fault": "kill", "rank": 0, "step": 3, "phase": "compute"}) + b"\n",),
        ),
        "metrics": Reader(
            reading(run.metrics, lambda: set_foreign_lines_aside(run.metrics, rising_steps())),
            (b"".join(_text({"step": n, "loss_hex": "0x1p0"}) + b"\n" for n in (1, 2, 3)),),
        ),
        "incident": Reader(
            reading(run.incidents / "generation-000002.json", lambda: _report(run)),
            (_text(_INCIDENT),),
        ),
        "evidence": Reader(
            reading(run.incidents / "evidence-a.json", lambda: _report(run)),
            (msgspec.json.encode(_EVIDENCE),),
        ),
        "events": Reader(
            reading(run.events, lambda: _history(run)),
            (_changes(),),
        ),
    }


_EVIDENCE = Evidence(
    role="hung",
    rank=1,
    about="1",
    stacks=(ThreadStack("main thread", (StackFrame("a.py", 3, "f"),)),),
    threads=(ThreadFacts(17, "python", "D", "wait", "fsync of /disk"),),
    operations=(LastOperation("send", "send", 2, "world", 7, 8, "open", 1.5),),
    memory=MemoryFacts(resident_bytes=1 << 20, limit_bytes=1 << 30),
    time=5.0,
)
_INCIDENT = {
    "generation": 2,
    "time": 6.0,
    "losses": [{"rank": 1, "incarnation": 0, "node": "a", "cause": "hung", "detected_s": None}],
    "notices": [{"kind": "suspected", "identity": "1", "cause": "hung", "node": "a"}],
    "evidence": [{"rank": 1, "incarnation": 0, "node": "a", "place": "", "file": "e.json"}],
    "before": [{"rank": 0, "node": "b"}, {"rank": 1, "node": "a"}],
    "after": [{"rank": 0, "node": "b"}],
    "total_s": 1.5,
}


def _report(run: RunDirectory) -> object:
    """The report; whether its one file was read, as another reader would say it."""
    found = found_in(run)
    lines = list(report_lines(found))
    for reason in found.unreadable.values():
        raise ConfigError(reason)
    return lines


_NODE = HealthReport(
    "a", (Check("rate", 2.5, "GFLOP/s", "least", limit=1.75), Check("bits", "ab", "", "equal"))
)


_NEW = HealthReport("b", _NODE.checks)


def _asked(path: Path) -> None:
    def never(*_: object) -> None:
        return None

    effects = FaultEffects(corrupt=lambda: None, cut=never, deadlock=lambda: None, miscompute=never)
    injector = FaultInjector(5, 0, (), asked=path, note=never, effects=effects, disk=path.parent)
    injector._position = 0  # as if all of it was asked for after the start
    injector.at(1, "compute")


def _history(run: RunDirectory) -> object:
    events = read_events(run.events)
    return history_of(events) if events else None


def _changes() -> bytes:
    change = {
        "event": "generation",
        "generation": 1,
        "step": 0,
        "within_step": False,
        "committed": False,
        "lost": [],
        "left": [],
        "leaving": [],
        "joined": [0, 1],
        "waiting": [],
        "placed": [],
        "filled": True,
        "nodes": {"0": "a", "1": "a"},
        "from_checkpoint": None,
        "plan": plan_to_data(first_plan()),
    }
    return _text(change) + b"\n" + _text({**change, "generation": 2, "step": 4}) + b"\n"


def message_readers() -> Mapping[str, Reader]:
    """The readers of what processes of a run tell each other."""
    return {**_messages(), "flight record": Reader(_flight_record, (_record(),))}
