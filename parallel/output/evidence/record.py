"""The file of evidence about one process: what it holds, how it is named, written and read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from holdfast.parallel.output.whole_files import write_whole
from holdfast.parallel.reading import Count, Text, decode_json, read_regular

Role = Literal["hung", "waiting", "failed"]
"""hung: it is going to be killed. waiting: it waits for one that is. failed: an error ends it."""
_MOST_BYTES = 16 << 20
_ANY_WAIT = ("/threading.py", "/queue.py", "/selectors.py", "/contextlib.py")
_LongText = Annotated[str, Meta(max_length=1 << 18)]


class StackFrame(msgspec.Struct, frozen=True):
    """One line of Python that a thread is in."""

    file: Text
    line: int
    function: Text

    @property
    def place(self) -> str:
        """The line for a person."""
        return f"{self.file}:{self.line} in {self.function}"


class ThreadStack(msgspec.Struct, frozen=True):
    """The lines of Python that a thread is in, the innermost first."""

    name: Text
    """Its name, "main thread", or its number where the name is not known."""
    frames: tuple[StackFrame, ...]


class ThreadFacts(msgspec.Struct, frozen=True):
    """A thread as the kernel sees it."""

    number: int
    name: Text
    state: Text
    """R: it runs. S: it waits. D: it waits for a device or a disk, and no signal ends that. T: a
    signal has stopped it. t: a debugger has."""
    waits_in: Text = ""
    """The function of the kernel in which it waits."""
    call: Text = ""
    """The system call that it is in, with the file that it is about, where that is known."""
    kernel_stack: Text = ""


class MemoryFacts(msgspec.Struct, frozen=True):
    """The memory of a process, in bytes. 0: not known, or no limit."""

    resident_bytes: Count = 0
    peak_bytes: Count = 0
    """The most that has been resident."""
    swapped_bytes: Count = 0
    group_bytes: Count = 0
    """The memory of its control group."""
    limit_bytes: Count = 0
    """The smallest limit of its control groups."""
    address_limit_bytes: Count = 0
    """The limit of its address space (ulimit -v)."""
    machine_free_bytes: Count = 0
    """The memory of the machine that is available."""
    kills: Count = 0
    """The processes of its control group that the kernel has killed for lack of memory."""


class LastOperation(msgspec.Struct, frozen=True):
    """One of the newest messages or collectives of a rank."""

    operation: Text
    direction: Text
    peer: int
    """The other rank; -1: its group."""
    group: Text
    tag: int
    bytes: int
    outcome: Text
    posted_s: float
    """Seconds since the call."""
    waited_s: float = 0.0
    """Seconds that the rank waited, or has waited until now; 0: it did not."""

    def line(self) -> str:
        """The operation in a line, for a person."""
        preposition = {"send": "to", "receive": "from"}.get(self.direction, "with")
        peer = "its group" if self.peer < 0 else f"rank {self.peer}"
        name = self.operation
        if name not in ("send", "receive") and self.direction in ("send", "receive"):
            name = f"{name}, {self.direction}"
        ends = {"open": "not ended", "done": "done", "failed": "failed"}
        waited = f", waited for {self.waited_s:.1f} s" if self.waited_s else ""
        end = ends.get(self.outcome, self.outcome)
        return (
            f"{name} {preposition} {peer} ({self.group}, tag {self.tag}, {self.bytes} bytes), "
            f"posted {self.posted_s:.1f} s before: {end}{waited}"
        )


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one process at one moment. What could not be found out is in `notes`.

    A field for each source, because each of them may be missing.
    """

    role: Role
    rank: Count
    incarnation: Count = 0
    node: Text = ""
    pid: Count = 0
    reason: Text = ""
    """The reason for which it is looked at, for a person."""
    about: Text = ""
    """The worker that hung or failed, as `RANK` or `RANK.INCARNATION`: itself, or the one that it
    waits for."""
    generation: Count = 0
    step: Count = 0
    """The step under way, counted from 1; 0: none."""
    busy: Text = ""
    """The work without messages that it said it did, and until when; for a person."""
    stacks: tuple[ThreadStack, ...] = ()
    """By thread, the main one first."""
    operations: tuple[LastOperation, ...] = ()
    """The newest operations, oldest first."""
    threads: tuple[ThreadFacts, ...] = ()
    memory: MemoryFacts = MemoryFacts()
    native: _LongText = ""
    """The native stacks, as py-spy or gdb prints them."""
    device: dict[str, Any] = {}
    """Numbers of the memory of its GPU, as torch counts it."""
    collectives: Any = None
    """torch's record of NCCL's operations, as it prints it."""
    error: _LongText = ""
    """The error that ends it, with its traceback and notes."""
    snapshot: Text = ""
    """The file with the GPU's allocations, for torch's viewer (pytorch.org/memory_viz)."""
    notes: tuple[Text, ...] = ()
    time: float = msgspec.field(default_factory=time.time)
    """Unix time."""

    @property
    def telling(self) -> tuple[StackFrame, ...]:
        """The lines that the main thread is in, without those of Python's own library in which any
        thread waits; all if there are no others."""
        frames = self.stacks[0].frames if self.stacks else ()
        return tuple(f for f in frames if not f.file.endswith(_ANY_WAIT)) or frames

    @property
    def place(self) -> str:
        """The innermost of these lines, for a person; empty if it is not known."""
        return next((frame.place for frame in self.telling), "")


def evidence_name(role: Role, identity: str, at_s: float | None = None) -> str:
    """The name of a file of evidence. No other one of the run has it.

    Args:
        identity: the worker, as `RANK` or `RANK.INCARNATION`.
        at_s: the time in seconds of unix time; None: now.
    """
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() if at_s is None else at_s))
    return f"evidence-{moment}-rank-{identity}-{role}.json"


def write_evidence(path: Path, evidence: Evidence) -> None:
    """Write evidence; the folder is made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode(evidence), indent=1)
    write_whole(path, content + b"\n")


def read_evidence(path: Path) -> Evidence:
    """The evidence in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not whole, or no evidence.
    """
    return decode_json(read_regular(path, _MOST_BYTES), Evidence)
