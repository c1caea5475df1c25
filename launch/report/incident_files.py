"""The incidents of a run and the evidence about them, as they lie in its folder.

What cannot be read is kept with the reason: a report says so, and tells of all the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from holdfast.parallel.output import Evidence, read_evidence
from holdfast.parallel.reading import Count, Text, decode_json, read_regular
from holdfast.trainer.run import RunDirectory, read_events

_BEFORE_S, _AFTER_S = 600.0, 60.0
"""Evidence that is older or younger is of another start of the run."""
_MOST_BYTES = 1 << 28
"""Of an incident, which has two plans of all ranks."""


class Loss(msgspec.Struct, frozen=True):
    """A rank that was lost."""

    rank: Count
    incarnation: Count = 0
    node: Text = ""
    cause: Text = ""
    detected_s: float | None = None

    @property
    def identity(self) -> str:
        """The worker, as `RANK` or `RANK.INCARNATION`."""
        return f"{self.rank}.{self.incarnation}" if self.incarnation else str(self.rank)


class Notice(msgspec.Struct, frozen=True):
    """An event that ranks heard of; see `holdfast.elastic.MembershipEvent`."""

    kind: Text = ""
    identity: Text = ""
    cause: Text = ""
    node: Text = ""


class Member(msgspec.Struct, frozen=True):
    """A rank of a generation."""

    rank: Count
    node: Text = ""


class Pointer(msgspec.Struct, frozen=True):
    """The place of evidence about a rank."""

    rank: Count
    incarnation: Count = 0
    node: Text = ""
    place: Text = ""
    file: Text = ""


class Incident(msgspec.Struct, frozen=True):
    """What a report tells of an incident. A field for each thing that it tells, as the run wrote
    it.
    """

    generation: Count
    time: float = 0.0
    losses: tuple[Loss, ...] = ()
    step: Count = 0
    """The number of steps committed at that time."""
    within_step: bool = False
    committed: bool = False
    replayed_steps: Count = 0
    recomputed_micro_batches: Count = 0
    agree_s: float = 0.0
    edit_s: float = 0.0
    move_s: float = 0.0
    total_s: float = 0.0
    moved_bytes: Count = 0
    from_checkpoint: Count | None = None
    notices: tuple[Notice, ...] = ()
    evidence: tuple[Pointer, ...] = ()
    before: tuple[Member, ...] = ()
    after: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in the folder of a run's incidents."""

    root: Path
    """The run's folder."""
    incidents: tuple[Incident, ...]
    """The readable ones, by time."""
    evidence: dict[str, Evidence] = field(default_factory=dict)
    """By the name of its file, by time."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """By the name of a file, why it cannot be read."""
    slow: tuple[str, ...] = ()
    """What was said of slow ranks and links, in the order in which it was found."""

    def names_of(self, incident: Incident) -> tuple[str, ...]:
        """The files of evidence about an incident, those about what hung or failed first.

        Beside those that it names there are those about a rank that it lost, gathered as it
        happened: the others may have gone on before that was done.
        """
        names = dict.fromkeys(pointer.file for pointer in incident.evidence)
        lost = {loss.identity for loss in incident.losses}
        for name, evidence in self.evidence.items():
            near = incident.time - _BEFORE_S < evidence.time < incident.time + _AFTER_S
            if evidence.about in lost and near:
                names[name] = None
            elif evidence.about and evidence.about not in lost:
                names.pop(name, None)  # it was late, and told with the next incident
        return tuple(sorted(names, key=self._is_beside))

    def _is_beside(self, name: str) -> bool:
        return name not in self.evidence or self.evidence[name].role == "waiting"

    @property
    def unnamed(self) -> tuple[str, ...]:
        """The evidence about no incident: no rank was left to write one, or none was lost."""
        named = {name for incident in self.incidents for name in self.names_of(incident)}
        return tuple(name for name in self.evidence if name not in named)


def found_in(run: RunDirectory) -> Found:
    """The incidents of a run, and the evidence about them. Local."""
    unreadable: dict[str, str] = {}
    incidents: list[Incident] = []
    evidence: dict[str, Evidence] = {}
    for path in sorted(run.incidents.glob("*.json")):
        try:
            if path.name.startswith("generation-"):
                incidents.append(decode_json(read_regular(path, _MOST_BYTES), Incident))
            elif path.name.startswith("evidence-"):
                evidence[path.name] = read_evidence(path)
        except OSError as error:
            unreadable[path.name] = error.strerror or str(error)
        except ValueError as error:
            unreadable[path.name] = str(error)
    incidents.sort(key=lambda incident: (incident.time, incident.generation))
    by_time = dict(sorted(evidence.items(), key=lambda item: item[1].time))
    return Found(run.root, tuple(incidents), by_time, unreadable, tuple(_slow(run)))


def _slow(run: RunDirectory) -> Iterator[str]:
    for event in read_events(run.events):
        step, message = event.get("step"), event.get("message")
        is_told = event["event"] in ("slow_link", "straggler") and isinstance(message, str)
        if is_told and isinstance(step, int):
            yield f"step {step}: {message}"
