"""A run's incidents in sentences. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from holdfast.launch.report.incident_files import Found, Incident, Loss, Pointer
from holdfast.parallel.errors import counted, named_ranks, size_text
from holdfast.parallel.output import Evidence

_LINES = 8
"""The innermost lines of Python that are told of a thread."""
_OPERATIONS = 4
_STATES = {
    "R": "runs",
    "S": "waits",
    "D": "waits for a device or a disk, and no signal ends that",
    "T": "stands still, as a signal stopped it",
}


def report_lines(found: Found) -> Iterator[str]:
    """What a person reads of a run's incidents, line by line."""
    count = len(found.incidents)
    told = counted(count, "incident") if count else "no incidents"
    yield f"{found.root}: {told}"
    for number, incident in enumerate(found.incidents, 1):
        yield ""
        yield from _incident(number, incident, found)
    if found.slow:
        yield ""
        yield "Slow ranks and links:"
        yield from _indented(found.slow)
    for name in found.unnamed:
        yield ""
        yield f"Evidence of no incident, {name}"
        yield from _indented(_evidence(found.evidence[name]))
    for name, reason in found.unreadable.items():
        yield ""
        yield f"{name} cannot be read: {reason}"


def _incident(number: int, incident: Incident, found: Found) -> Iterator[str]:
    lost = [f"rank {loss.identity} on node {loss.node or 'unknown'}" for loss in incident.losses]
    who = " and ".join(lost) or "no rank"
    were = "were" if len(lost) > 1 else "was"
    where = f"in step {incident.step + (not incident.committed)}"
    if not incident.within_step:
        where = f"between steps, after step {incident.step}"
    yield f"Incident {number}, {_moment(incident.time)}: {who} {were} lost {where}"
    yield from _indented(_course(incident))
    pointers = {pointer.file: pointer for pointer in incident.evidence}
    for name in found.names_of(incident):
        yield ""
        if (evidence := found.evidence.get(name)) is not None:
            yield f"  {_about(evidence)} ({name})"
            yield from _indented(_details(evidence), 2)
        else:
            yield from _indented([_absent(pointers[name], found)])


def _course(incident: Incident) -> Iterator[str]:
    """What noticed the losses, what they cost, and how long each phase took."""
    for loss in incident.losses:
        yield f"Rank {loss.identity}: {loss.cause or 'the cause is not recorded'}."
        yield _noticed(incident, loss)
    causes = " ".join(loss.cause for loss in incident.losses)
    waits = [
        notice
        for notice in incident.notices
        if notice.kind == "waiting" and "has waited" in notice.cause and notice.cause not in causes
    ]
    yield from (f"Rank {wait.identity} on node {wait.node} {wait.cause}." for wait in waits)
    yield _cost(incident)
    moved = f" ({size_text(incident.moved_bytes)} moved)" if incident.moved_bytes else ""
    phases = (incident.agree_s, incident.edit_s, incident.move_s)
    rest_s = incident.total_s - sum(phases)
    yield (
        f"The change took {incident.total_s:.2f} s: agreement {phases[0]:.2f} s, connections "
        f"{phases[1]:.2f} s, state {phases[2]:.2f} s{moved}, the rest {max(0.0, rest_s):.2f} s."
    )
    before, after = (
        named_ranks([member.rank for member in members], ", ")
        for members in (incident.before, incident.after)
    )
    if incident.before and incident.after:
        yield f"Of {before}, {after} went on, as generation {incident.generation}."


def _noticed(incident: Incident, loss: Loss) -> str:
    """What noticed a loss."""
    about = [n for n in incident.notices if n.identity == loss.identity]
    kinds = {notice.kind: notice for notice in about}
    if "suspected" in kinds:
        by = f"the agent of node {kinds['suspected'].node}, which looked at it and killed it"
    elif "silent" in kinds:
        by = "agents that watch the heartbeats"
    elif "ended" in kinds:
        by = "its agent, which saw its process end"
    else:
        by = "the other ranks, which it did not answer"
    last = f", {loss.detected_s:.1f} s after its last sign of life" if loss.detected_s else ""
    return f"Noticed by {by}{last}."


def _cost(incident: Incident) -> str:
    if incident.from_checkpoint is not None:
        return (
            f"State was lost: training went back to the checkpoint of step "
            f"{incident.from_checkpoint}, and {counted(incident.replayed_steps, 'step')} were done "
            "again."
        )
    if not incident.within_step:
        return "Nothing was lost and nothing computed again."
    if incident.committed:
        return "The step was finished without it; nothing was computed again."
    again = counted(incident.recomputed_micro_batches, "micro-batch", "micro-batches")
    return f"No step was lost; of step {incident.step + 1}, {again} had to be computed again."


# The evidence about one rank.


def _about(evidence: Evidence) -> str:
    identity = _numbered(evidence.rank, evidence.incarnation)
    what = {
        "hung": "as it hung",
        "waiting": "as it waited",
        "failed": "as an error ended it",
    }[evidence.role]
    node = f" on node {evidence.node}" if evidence.node else ""
    return f"Rank {identity}{node} {what}"


def _evidence(evidence: Evidence) -> Iterator[str]:
    yield f"{_about(evidence)}, {_moment(evidence.time)}: {evidence.reason}"
    yield from _details(evidence)


def _details(evidence: Evidence) -> Iterator[str]:
    if evidence.place:
        yield f"It was in {evidence.place}. The innermost lines of its main thread:"
        yield from (f"  {frame.place}" for frame in evidence.telling[:_LINES])
    if evidence.role == "waiting":
        return
    if evidence.error:
        last = evidence.error.strip().splitlines()
        noted = [line.strip() for line in last if line.startswith("operation before: ")]
        yield f"The error: {evidence.reason.splitlines()[0] if evidence.reason else last[-1]}"
        yield from (f"  {line}" for line in noted[-_OPERATIONS:])
    if evidence.step:
        busy = f"; {evidence.busy}" if evidence.busy else ""
        yield f"It was in step {evidence.step} of generation {evidence.generation}{busy}."
    yield from _kernel(evidence)
    if evidence.operations:
        yield "Its last operations, the newest last:"
        yield from (f"  {operation.line()}" for operation in evidence.operations[-_OPERATIONS:])
    if memory := _memory(evidence):
        yield memory
    if evidence.snapshot:
        yield f"The GPU's allocations are in {evidence.snapshot} (pytorch.org/memory_viz)."
    if evidence.native:
        yield f"Native stacks: {counted(len(evidence.native.splitlines()), 'line')} in the file."
    if evidence.collectives is not None:
        yield "torch's record of NCCL's operations is in the file."
    yield from (f"Not known: {note}." for note in evidence.notes)


def _kernel(evidence: Evidence) -> Iterator[str]:
    """What the kernel says of the main thread, and of those that wait for a disk."""
    for number, thread in enumerate(evidence.threads):
        if number and thread.state != "D":
            continue
        name = "main thread" if not number else f"thread {thread.name}"
        call = f", in the system call {thread.call}" if thread.call else ""
        inside = f" ({thread.waits_in})" if thread.waits_in else ""
        doing = _STATES.get(thread.state, f"has the state {thread.state}")
        yield f"To the kernel its {name} {doing}{'' if thread.state == 'T' else call + inside}."


def _memory(evidence: Evidence) -> str:
    memory = evidence.memory
    if not memory.resident_bytes:
        return ""
    told = [f"{size_text(memory.resident_bytes)} resident (at most {size_text(memory.peak_bytes)})"]
    if memory.swapped_bytes:
        told.append(f"{size_text(memory.swapped_bytes)} swapped out")
    if memory.limit_bytes:
        used, limit = size_text(memory.group_bytes), size_text(memory.limit_bytes)
        told.append(f"{used} of the {limit} of its control group")
    if memory.address_limit_bytes:
        told.append(f"a limit of {size_text(memory.address_limit_bytes)} on addresses")
    if memory.machine_free_bytes:
        told.append(f"{size_text(memory.machine_free_bytes)} available on the machine")
    if memory.kills:
        told.append(f"{counted(memory.kills, 'process', 'processes')} of its group killed for lack")
    device = evidence.device
    free, total = device.get("free"), device.get("total")
    if isinstance(free, int) and isinstance(total, int):
        told.append(f"{size_text(total - free)} of {size_text(total)} in use on its GPU")
    return f"Memory: {'; '.join(told)}."


def _absent(pointer: Pointer, found: Found) -> str:
    identity = _numbered(pointer.rank, pointer.incarnation)
    why = found.unreadable.get(pointer.file)
    said = f"cannot be read: {why}" if why else f"is not here; node {pointer.node} wrote it"
    place = f" It was in {pointer.place}." if pointer.place else ""
    return f"Rank {identity}:{place} Its evidence, {pointer.file or 'a file'}, {said}."


# Words.


def _numbered(rank: int, incarnation: int) -> str:
    return f"{rank}.{incarnation}" if incarnation else str(rank)


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _indented(lines: Iterator[str] | Sequence[str], levels: int = 1) -> Iterator[str]:
    return (f"{'  ' * levels}{line}" for line in lines)
