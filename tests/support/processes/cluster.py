"""A pool of real worker processes that tests share: ranks that talk over gloo, forked from one
process that imports torch once a session.

A job names a module-level function `function(rank, world_size, store, **arguments)` of a test
module; it runs on the first `world_size` workers, each with a store of its own prefix, and what it
returns (or raises) on every rank comes back.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

WORKERS = 12
OTHERS_S = 3.0
"""Seconds that others have once a rank has failed; it stays connected, so some may wait for it."""


class WorkerFailed(AssertionError):
    """A job raised on one or more ranks; the message holds every traceback."""


class Cluster:
    """Processes waiting for jobs. A job that hangs or dies ends the pool; the next has another,
    forked from the same process.
    """

    def __init__(
        self,
        workers: int = WORKERS,
        *,
        imports: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """No process is started before the first job.

        Args:
            imports: further modules that are imported once, and not by every worker.
            environment: variables for all processes.
        """
        self._workers = workers
        self._imports = imports
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._pool = 0
        self._connections: list[Connection] = []
        self._jobs = 0

    def run(
        self,
        function: str,
        world_size: int,
        *,
        first_worker: int = 0,
        timeout_s: float = 90.0,
        dying: Collection[int] = (),
        **arguments: Any,
    ) -> list[Any]:
        """Run `module:function` on `world_size` ranks; results by rank.

        Args:
            first_worker: the worker that is rank 0; those after it are the others.
            dying: ranks that the job kills or stops, of which no result is awaited (None stands in
                its place); the next job gets a new pool.
        Raises:
            WorkerFailed: with the traceback of every rank that raised.
        """
        if not self._connections:
            self._start()
        self._jobs += 1
        connections = self._connections[first_worker : first_worker + world_size]
        for rank, connection in enumerate(connections):
            connection.send((function, rank, world_size, self._jobs, arguments))
        awaited = {c: rank for rank, c in enumerate(connections) if rank not in dying}
        results, failures = _results_of(awaited, timeout_s)
        if failures or dying:
            self._end_pool()
        if failures:
            raise WorkerFailed("\n".join(text for _, text in sorted(failures.items())))
        return [results.get(rank) for rank in range(world_size)]

    def close(self) -> None:
        """End all processes."""
        self._end_pool()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _end_pool(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._connections:
            self._connections = []
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pool, signal.SIGKILL)

    def _start(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = self._importing_process()
        assert self._process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            address = str(Path(folder) / "pool")
            with Listener(address, "AF_UNIX", backlog=self._workers) as listener:
                self._process.stdin.write(f"{address}\n".encode())
                self._process.stdin.flush()
                connected = {}
                for _ in range(self._workers):
                    connection = self._accept(listener, self._process)
                    rank, self._pool = connection.recv()
                    connected[rank] = connection
        self._connections = [connected[rank] for rank in range(self._workers)]

    def _importing_process(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            **self._environment,
        }
        return subprocess.Popen(
            [sys.executable, __file__, str(self._workers), *self._imports],
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @staticmethod
    def _accept(listener: Listener, process: subprocess.Popen[bytes]) -> Connection:
        """The next worker's connection.

        Raises:
            WorkerFailed: the process that forks the workers has ended before they were there.
        """
        accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        threading.Thread(target=lambda: accepted.put(listener.accept()), daemon=True).start()
        while process.poll() is None:
            with contextlib.suppress(queue.Empty):
                return accepted.get(timeout=0.5)
        raise WorkerFailed(
            f"the pool's process ended with {process.returncode} before it had workers"
        )


def _results_of(
    awaited: dict[Connection, int], timeout_s: float
) -> tuple[dict[int, Any], dict[int, str]]:
    """What ranks return, and why others have no result, by rank."""
    results, failures = {}, {}
    end_s = time.monotonic() + timeout_s
    while awaited:
        ready = wait(list(awaited), max(0.0, end_s - time.monotonic()))
        if not ready:
            failures |= {rank: f"rank {rank} gave no result" for rank in awaited.values()}
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = awaited.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError) as error:
                succeeded, value = False, repr(error)
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = f"rank {rank}:\n{value}"
                end_s = min(end_s, time.monotonic() + OTHERS_S)
    return results, failures


def _serve(workers: int, imports: Sequence[str]) -> None:
    """Import, and fork a pool for each address that is read."""
    import torch

    from support.processes.preloaded import TRAINING

    for name in ("support.runs.small_runs", *TRAINING, *imports):
        importlib.import_module(name)
    torch.set_num_threads(1)
    # Else a thread that is sent a message takes the processor from the sender, which holds the lock
    # of their connection: gloo's thread then asks for it until its time is up, half of all time.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.freeze()  # what is imported is not looked through after each job
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a pool that has ended is forgotten
    for address in sys.stdin:
        if os.fork() == 0:
            try:
                _serve_pool(address.strip(), workers)
            except BaseException:
                traceback.print_exc()
                os.kill(os.getppid(), signal.SIGKILL)  # so that no test waits for this pool
            os._exit(0)


def _serve_pool(address: str, workers: int) -> None:
    import torch.distributed as dist

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(4 * workers)
    port = listening.getsockname()[1]
    for rank in range(workers):
        if os.fork() == 0:
            listening.close()
            _work(address, rank, port)
            os._exit(0)
    server = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    with contextlib.suppress(ChildProcessError):
        while True:  # a worker that is killed on purpose leaves the store to the others
            os.wait()
    del server


def _work(address: str, rank: int, port: int) -> None:
    import torch.distributed as dist

    from support.processes import tensor_pickles

    connection = Client(address, "AF_UNIX")
    connection.send((rank, os.getpgrp()))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        try:
            function, job_rank, world_size, job, arguments = connection.recv()
        except EOFError:
            return
        # The groups of the last job, which all ranks have ended, refer to each other, and each has
        # a thread that wakes up 100 times a second.
        result = None
        gc.collect()
        try:
            module, name = function.split(":")
            call = getattr(importlib.import_module(module), name)
            prefixed = dist.PrefixStore(f"job{job}", store)
            result = call(job_rank, world_size, prefixed, **arguments)
            connection.send_bytes(tensor_pickles.dump((True, result)))
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2:])
