"""Starts an elastic run on this machine: agents, their workers, and what agents read of workers' waits."""

from __future__ import annotations

import logging
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.elastic.hang import Wait
from holdfast.elastic.seat import Seat
from holdfast.launch.local import keep_memory
from holdfast.launch.nodes import local_nodes, run_nodes
from holdfast.launch.show import start_display
from holdfast.parallel.operations import RankPage, read_page
from holdfast.parallel.watchdog import silent_operations
from holdfast.trainer.config import RunConfig
from holdfast.trainer.resume import checkpoint_root, memory_root
from holdfast.trainer.run_directory import RunDirectory


def run_elastic(config: RunConfig, run: RunDirectory) -> int:
    """Train on this machine, on `elastic.local_nodes` nodes; returns the exit code for the command.

    Called in the main thread of a process that has no other.
    """
    from holdfast.trainer.worker import describe, root_cause, run_seat

    def main(seat: Seat, line: socket.socket) -> int:
        return run_seat(config, seat, line, run)

    log_agents(run)
    ranks = config.parallel.ranks
    # Fewer ranks than make up one stage cannot go on: they wait for others.
    least = max(config.elastic.min_ranks, config.parallel.tensor)
    nodes = local_nodes(
        msgspec.structs.replace(config.elastic, min_ranks=least),
        ranks,
        token=uuid.uuid4().hex,
        log=run.log,
        exit_s=config.checkpoint.exit_s,
        waits=waits_of(config.elastic.hang_timeout_s),
    )
    memory = memory_root(run.root)
    display = start_display(config, run)
    try:
        with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
            code = run_nodes(nodes, main, Path(folder))
    finally:
        display.close()
        keep_memory(memory, checkpoint_root(run.root, config))
    if code not in (0, 130):
        cause = root_cause(run, range(ranks))
        line = describe(cause, run) if cause is not None else ""
        print(line or f"holdfast: the run stopped (log: {run.agent_log})", file=sys.stderr)  # noqa: T201
    return code


def log_agents(run: RunDirectory) -> None:
    """Send the agents' log to its own file."""
    handler = logging.FileHandler(run.agent_log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("holdfast")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def waits_of(hang_timeout_s: float) -> Callable[[Seat], Wait | None]:
    """What reads from the pages of a node's workers whether one has waited for others for too long."""

    def waits(seat: Seat) -> Wait | None:
        own = _page(seat.page)
        if own is None:
            return None
        now_s = time.monotonic()
        limit_s = max(hang_timeout_s, 5 * own.median_step_s)
        late = [
            o
            for o in own.operations
            if o.is_waited_for and now_s - o.waited_s > limit_s and o.peer >= 0
        ]
        if not late:
            return None
        others = [_page(path) for path in Path(seat.folder).glob("*.page") if path != seat.page]
        found = silent_operations(
            [own, *(page for page in others if page is not None)],
            now_s,
            hang_timeout_s=hang_timeout_s,
        )
        described = next((s.describe() for s in found if s.rank == seat.rank), "")
        longest = max(now_s - o.waited_s for o in late)
        return Wait(frozenset(o.peer for o in late), longest, described)

    return waits


def _page(path: Path) -> RankPage | None:
    try:
        return read_page(path)
    except (OSError, ValueError):
        return None
