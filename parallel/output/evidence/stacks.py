"""The Python stacks of a process: on a signal that another one sends, and its own.

The handler of the signal needs no lock of the interpreter, so it works while native code holds it.
It runs in a thread that does nothing else. All other threads block the signal: no system call of
theirs is interrupted, and a main thread that the kernel holds for a disk is not needed.

A process that a signal has stopped must be let run for it, and its main thread would go on before
the other thread comes. So there is a second signal, for the main thread: it is handled before
anything else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import re
import signal
import sys
import threading
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType

from holdfast.parallel.files import create_file
from holdfast.parallel.output.evidence.record import StackFrame, ThreadStack

STACKS_SIGNAL = signal.SIGUSR2
_OF_STOPPED = signal.SIGRTMIN + 1
MAIN = "main thread"
_MOST_FRAMES = 100
_MOST_THREADS = 64
_HEADER = "main thread 0x{:016x}\n"
_MAIN = re.compile(r"^main thread (0x[0-9a-f]+)$", re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[(.*)\])? \(most recent call")
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')


def stacks_on_signal(path: Path) -> None:
    """Have the stacks of all threads appended to a file whenever a signal asks for them.

    Call it once, in the main thread, before the process starts threads: they, and the processes
    that it starts, block the signal as the main thread does from now on.

    Raises:
        OSError: the file cannot be made.
    """
    file = create_file(path)
    file.write(_HEADER.format(threading.main_thread().ident or 0).encode())
    file.flush()
    # The handler first: until it is there the signal would end the process.
    for number in (STACKS_SIGNAL, _OF_STOPPED):
        faulthandler.register(number, file=file, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, {STACKS_SIGNAL})
    threading.Thread(target=_take_signal, name="holdfast-stacks", daemon=True).start()


def _take_signal() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})
    threading.Event().wait()


def ask_for_stacks(pid: int, descriptor: int, *, is_stopped: bool) -> None:
    """Send a process the signal for its stacks, and let it run if it is stopped.

    Args:
        descriptor: its pidfd.
    Raises:
        ProcessLookupError: it has ended.
    """
    if not is_stopped:
        signal.pidfd_send_signal(descriptor, STACKS_SIGNAL)
        return
    signal.pidfd_send_signal(descriptor, 0)
    main_thread = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)
    if main_thread is None or main_thread(pid, pid, _OF_STOPPED):
        signal.pidfd_send_signal(descriptor, STACKS_SIGNAL)
    signal.pidfd_send_signal(descriptor, signal.SIGCONT)


def parsed_stacks(text: str) -> tuple[ThreadStack, ...]:
    """The stacks in what the handler has written, those of the last signal. Pure.

    The main thread is the first; it may be missing where the text is cut off.
    """
    found = _MAIN.search(text)
    main = int(found[1], 16) if found else 0
    stacks: dict[int, ThreadStack] = {}
    frames: list[StackFrame] = []
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            frames, number = [], int(thread[1], 16)
            if number in stacks:  # a later signal
                stacks.clear()
            name = MAIN if number == main else thread[2] or f"thread {thread[1]}"
            stacks[number] = ThreadStack(name, ())
        elif stacks and (frame := _FRAME.match(line)):
            file, at, function = frame.groups()
            frames.append(StackFrame(file, int(at) if at.isdigit() else 0, function))
            number = next(reversed(stacks))
            stacks[number] = ThreadStack(stacks[number].name, tuple(frames))
    return _main_first(tuple(stacks.values()))


def own_threads() -> tuple[ThreadStack, ...]:
    """The stacks of all threads of this process, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    stacks = (
        ThreadStack(MAIN if number == main else names.get(number, f"thread {number}"), _of(frame))
        for number, frame in islice(sys._current_frames().items(), _MOST_THREADS)
    )
    return _main_first(tuple(stacks))


def frames_of_error(error: BaseException) -> tuple[StackFrame, ...]:
    """The lines that an error came through, the innermost first."""
    frames: list[StackFrame] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(StackFrame(code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return tuple(frames[: -_MOST_FRAMES - 1 : -1])


def _of(frame: FrameType | None) -> tuple[StackFrame, ...]:
    frames: list[StackFrame] = []
    while frame is not None and len(frames) < _MOST_FRAMES:
        code = frame.f_code
        frames.append(StackFrame(code.co_filename, frame.f_lineno or 0, code.co_name))
        frame = frame.f_back
    return tuple(frames)


def _main_first(stacks: tuple[ThreadStack, ...]) -> tuple[ThreadStack, ...]:
    return tuple(sorted(stacks, key=lambda stack: stack.name != MAIN))
