"""The start of a run's workers on this machine: import once, fork all, watch them.

The parent stays single-threaded until the workers are forked, so that no lock is held in the
copies. torch is imported once instead of once per worker.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from holdfast.checkpoint.tiers import flush
from holdfast.launch.launchers.interrupt import tell_interrupted
from holdfast.launch.processes import (
    Linux,
    Supervisor,
    System,
    append_output,
    fork_child,
    on_signals,
)
from holdfast.parallel.errors import CheckpointError, Interrupted, Stopped
from holdfast.parallel.links import HostedStore, listen, new_secret
from holdfast.parallel.output import tell
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run import RunDirectory, checkpoint_root, memory_root
from holdfast.trainer.worlds import WorldInfo, local_world

_EXIT_S = 3.0
_COLLECT_S = 0.5
"""Seconds to collect the reasons of workers that fail together."""
_TICK_S = 0.1
_WORD = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """The end of a worker process: an exit code, or the negative number of a signal."""

    rank: int
    code: int
    is_silent: bool = False
    """Whether it ended with 0, and without its word that its work is done."""


Main = Callable[[WorldInfo], int]


def run_local(config: RunConfig, run: RunDirectory, world_size: int) -> int:
    """Train on `world_size` local workers. Returns the command's exit code.

    If a worker fails, one line is printed: the reason of the first that failed by itself.
    """
    from holdfast.trainer import describe, root_cause, run_worker, train

    def main(world: WorldInfo) -> int:
        return run_worker(config, world, run, announce=False, task=partial(train, alone=False))

    memory = memory_root(run.root)
    try:
        ends = start_workers(main, world_size, run, exit_s=config.checkpoint.exit_s)
    finally:
        keep_memory(memory, checkpoint_root(run.root, config))
    failed = [end for end in ends if end.code != 0]
    if not failed:
        return 0
    cause = root_cause(run, range(world_size))
    if all(end.code == -signal.SIGINT for end in ends):
        tell_interrupted(run, cause, sys.argv)
        return Interrupted.exit_code
    silent = next((end for end in failed if end.is_silent), None)
    if silent is not None and (cause is None or cause.exit_code == Stopped.exit_code):
        tell(
            f"holdfast: rank {silent.rank} ended before its work was done, with exit code 0; the "
            f"run stopped (log: {run.log(silent.rank)})"
        )
        return Stopped.exit_code
    killed = next((end for end in failed if end.code < 0), None)
    if cause is not None and (killed is None or cause.exit_code != 3):
        tell(describe(cause, run))
        return cause.exit_code
    if killed is not None:
        name = signal.Signals(-killed.code).name
        tell(
            f"holdfast: rank {killed.rank} was killed by {name}; the run stopped "
            f"(log: {run.log(killed.rank)})"
        )
        return 3
    tell(
        f"holdfast: rank {failed[0].rank} exited with code {failed[0].code} "
        f"(log: {run.log(failed[0].rank)})"
    )
    return failed[0].code


def keep_memory(memory: Path | None, disk: Path) -> None:
    """Flush the newest copy in shared memory to the disk if it is newer, and free the memory.

    This process outlives the workers, so copies that they had committed survive their crash.
    """
    if memory is None or not memory.exists():
        return
    try:
        copied = flush(memory, disk)
    except (OSError, CheckpointError) as error:
        tell(
            f"holdfast: the copy in {memory} could not be put on the disk and stays there: {error}"
        )
        return
    if copied is not None:
        tell(f"holdfast: kept the copy in memory as {copied}")
    shutil.rmtree(memory, ignore_errors=True)


def start_workers(
    main: Main, world_size: int, run: RunDirectory, *, exit_s: float = _EXIT_S
) -> list[WorkerEnd]:
    """Fork `world_size` workers that call `main`, and wait for them all.

    If one fails, the others get SIGKILL a moment later. SIGINT, SIGTERM and SIGUSR1 to this process
    are passed on to the workers; a second SIGINT kills them. A worker dies with this process,
    however that ends.

    Args:
        exit_s: seconds that workers may take to end after SIGTERM, and after the first has ended
            that was interrupted.
    Returns:
        The ends in order of time. Workers that were killed because another failed have code 0, and
        that one has its own; after SIGINT to this process all have its negative number, unless
        they have done their work.
    """
    listening = listen("127.0.0.1")
    port, secret = listening.getsockname()[1], new_secret()
    words = _Words()
    gc.freeze()

    def body(rank: int) -> int:
        listening.close()
        if rank != 0:
            append_output(run.log(rank))
        return words.said(rank, main(local_world(rank, world_size, port, secret)))

    ranks = {fork_child(partial(body, rank)): rank for rank in range(world_size)}
    store = HostedStore(listening, local_world(0, world_size, port, secret).store_key)
    try:
        return watch_workers(ranks, exit_s, has_finished=words.has_come_from)
    finally:
        words.close()
        store.close()


class _Words:
    """The words of workers that their work is done, through a pipe to their parent.

    An exit code of 0 does not say it: any library can end the process so.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._come: set[int] = set()

    def said(self, rank: int, code: int) -> int:
        """Say in a worker that its work is done, if it ends with this code. Returns the code."""
        if code == 0:
            os.write(self._writer, _WORD.pack(rank))
        return code

    def has_come_from(self, rank: int) -> bool:
        """Whether a worker, which has ended, has said it."""
        with contextlib.suppress(BlockingIOError):
            while word := os.read(self._reader, _WORD.size):
                self._come.add(_WORD.unpack(word)[0])
        return rank in self._come

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def watch_workers(
    ranks: Mapping[int, int],
    exit_s: float,
    system: System | None = None,
    has_finished: Callable[[int], bool] = lambda rank: True,
) -> list[WorkerEnd]:
    """Wait for all workers, given by process id; see `start_workers`.

    Args:
        has_finished: whether a rank that ended with 0 has said that its work is done.
    """
    system = system or Linux()
    workers = Supervisor(list(ranks), system=system)
    forwarded: list[int] = []
    ends: list[WorkerEnd] = []
    stopping_since: float | None = None

    def forward(number: int) -> None:
        if number != signal.SIGUSR1:
            forwarded.append(number)
        workers.signal(signal.SIGKILL if forwarded.count(signal.SIGINT) > 1 else number)

    with on_signals(forward):
        while workers:
            for end in workers.wait(_TICK_S):
                rank = ranks[end.pid]
                after_another = workers.has_killed and any(e.code for e in ends)
                killed_here = end.code == -signal.SIGKILL and after_another
                if end.code == 0 and not has_finished(rank):
                    ends.append(WorkerEnd(rank, Stopped.exit_code, is_silent=True))
                else:
                    ends.append(WorkerEnd(rank, 0 if killed_here else end.code))
            told = [number for number in forwarded if number != signal.SIGINT]
            if stopping_since is None and (told or any(end.code != 0 for end in ends)):
                stopping_since = system.now_s()
            if stopping_since is not None:
                workers.kill_at(stopping_since + _patience_s(forwarded, exit_s))
    if forwarded[:1] == [signal.SIGINT] and any(end.code for end in ends):
        ends = [WorkerEnd(end.rank, -signal.SIGINT) for end in ends]
    return ends


def _patience_s(forwarded: Sequence[int], exit_s: float) -> float:
    """Seconds that workers may live after one failed or a signal came."""
    return exit_s if forwarded else _COLLECT_S
