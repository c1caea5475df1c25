"""Scalars for TensorBoard, in event files of our own, in which every step is shown once."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from holdfast.parallel.output import AppendedFile, DiskWord, Tail

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class ScalarFile:
    """One event file. A reader forgets the steps of earlier files that this one repeats.

    Each step is written at once, so the scalars of a process that is killed are complete. No method
    raises OSError.
    """

    def __init__(self, folder: Path, first: int, word: DiskWord) -> None:
        """Begin a file.

        Args:
            first: the number of steps done already; earlier files' later steps are not shown.
            word: told when the file cannot be written.
        """
        # Imported here: the import takes longer than the first steps of a small run.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore

        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        self._file = AppendedFile(folder / _next_name(folder), word, Tail.KEPT)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))

    def step(self, step: int, values: dict[str, float]) -> None:
        """Add the scalars of a step, by name."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyrefly: ignore

        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


def _next_name(folder: Path) -> str:
    """The name of a new event file. Readers take files in the order of their names.

    So its time is later than those of the files there, whatever the clock says.
    """
    with contextlib.suppress(OSError):
        found = [_NAME.match(name) for name in os.listdir(folder)]
        latest = max((int(match[1]) for match in found if match), default=0)
        number = max(int(time.time()), latest + 1)
        return f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
