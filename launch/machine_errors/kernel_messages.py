"""The messages of the kernel since this process looks, and the errors that they tell of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from holdfast.launch.machine_errors.kinds import FATAL_XIDS, MESSAGES, XID, MachineError

_RECORD_BYTES = 1 << 13
"""The kernel gives one record to each read, and none is larger."""
_MOST_RECORDS = 10_000
"""Those that one look takes; others wait for the next one."""


class KernelMessages:
    """The new messages of /dev/kmsg, or of a file that grows. Used by one thread."""

    def __init__(self, path: Path) -> None:
        """Begin after the last message; where the file cannot be opened, there are none."""
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._descriptor, 0, os.SEEK_END)

    def errors(self) -> list[MachineError]:
        """The errors in the messages since the last call."""
        return list(errors_in(self._new_lines()))

    def _new_lines(self) -> Iterator[str]:
        for _ in range(_MOST_RECORDS if self._descriptor is not None else 0):
            try:
                record = os.read(self._descriptor, _RECORD_BYTES)  # pyrefly: ignore
            except BrokenPipeError:  # what was next has been overwritten
                continue
            except OSError:  # nothing is there yet
                return
            if not record:
                return
            yield from record.decode(errors="replace").splitlines()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def errors_in(lines: Iterable[str]) -> Iterator[MachineError]:
    """The errors that messages of the kernel tell of. Pure."""
    for line in lines:
        if found := XID.search(line):
            number = int(found[2])
            what = FATAL_XIDS.get(number, "a GPU has reported an error")
            device, is_fatal = found[1], number in FATAL_XIDS
            yield MachineError("xid", device, 1, f"{what} (Xid {number})", is_fatal)
            continue
        for message in MESSAGES:
            if found := message.pattern.search(line):
                device = next(filter(None, found.groups()), "memory")
                yield MachineError(message.kind, device, 1, message.what, message.is_serious)
                break
