"""Saves in a loop in two processes that are killed at random instants, and looks at what is left.

Run as `python crash_rounds.py FOLDER ROUNDS SEED`; prints one JSON line. What is saved says which
step it is, so that a checkpoint of mixed steps is seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor  # before forking: it takes longer than a round

from holdfast.checkpoint import Checkpointer, load
from holdfast.checkpoint.format.names import PARTIAL, step_of
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.verify import verify_checkpoint

SHAPE = (1500, 400)


def _state(step: int) -> dict[str, Any]:
    return {name: torch.full(SHAPE, float(step + number)) for number, name in enumerate("abc")}


def _save_for_ever(folder: Path, rank: int, port: int, listening: int) -> None:
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, master_listen_fd=listening
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state = _state(0)
    checkpointer = Checkpointer(folder, state, keep=2)
    step = checkpointer.load() or 0
    while True:
        step += 1
        for value in state.values():
            value += 1
        checkpointer.save(step)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _round(folder: Path, part: float, save_s: float, *, after_commit: bool) -> float:
    """Kill both processes within the first save, or once one is committed within the next.

    Args:
        part: of the time of a save, after which they are killed.
        save_s: that time, so far as it is known.
    Returns:
        The time of a save, as long as it takes now.
    """
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    port = listening.getsockname()[1]
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        rank = 0 if os.fork() else 1
        if rank == 1:
            listening.close()
        _save_for_ever(folder, rank, port, listening.detach() if rank == 0 else -1)
    listening.close()
    before = _names(folder)
    _wait_for(lambda: _names(folder) != before)
    if after_commit:
        began = time.monotonic()
        _wait_for(lambda: any(step_of(name) is not None for name in _names(folder) - before))
        save_s = time.monotonic() - began
    time.sleep(part * save_s)
    os.killpg(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    return save_s


def _wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.001)


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(int(sys.argv[3]))
    reached, torn, newest, save_s = 0, 0, 0, 0.1
    for number in range(rounds):
        # So that half of all rounds save one, however fast this machine is just now.
        save_s = _round(folder, chance.random(), save_s, after_commit=number % 2 == 1)
        if not folder.exists():
            continue
        torn += any(path.name.endswith(PARTIAL) for path in folder.iterdir())
        found = LocalStore(folder).paths()
        if not found:
            assert reached == 0, "a committed checkpoint is gone"
            continue
        step = step_of(found[-1].name) or 0
        assert step >= newest, f"step {newest} was committed, and now {step} is the newest"
        for path in found:
            assert verify_checkpoint(path) == [], path
            state = _state(0)
            load(path, state)
            wanted = _state(step_of(path.name) or 0)
            assert all(torch.equal(state[name], wanted[name]) for name in wanted), path
        if step > newest:
            reached, newest = reached + 1, step
    print(json.dumps({"reached": reached, "torn": torn, "newest": newest}))


if __name__ == "__main__":
    main()
