"""What the ranks of benchmarks/link.py do, each in its own network namespace."""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from training_contestants import Work, build

PORT = 20000
"""Of the store, in the namespace of rank 0."""
TRANSFER_S = 1.0
"""How long the transfer lasts that measures a rate."""


@dataclass(frozen=True, slots=True)
class Node:
    """The place of one rank."""

    namespace: str
    address: str
    master: str
    """The address of rank 0."""


STEPS = 3
"""Made by each contestant in turn, since a step may leave messages for the next one to await."""


class Taken(NamedTuple):
    """What one step took on one rank, on average over `STEPS` and all that they left to do."""

    seconds: float
    cpu_s: float
    """Processor time of all threads, which other work on the machine leaves much as it is."""
    sent_bytes: float


def enter(node: Node) -> None:
    """Move this process to its namespace; torch's gloo shall listen there."""
    from support.runs.elastic_demo import enter_network

    enter_network(node.namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def sent_bytes() -> int:
    """What this process' interface has sent. (/sys shows another namespace's.)"""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith("eth0:"))
    return int(fields.split(":")[1].split()[8])


def transfer(rank: int, nodes: Sequence[Node], store: dist.Store) -> tuple[float, float]:
    """Plain TCP, each rank to the next, all at once.

    Returns:
        Megabits per second that this rank received; the median milliseconds of a round trip of one
        byte between the first two ranks before that.
    """
    node, ranks = nodes[rank], len(nodes)
    after = (rank + 1) % ranks
    with ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.create_server((node.address, 0)))
        store.set(f"port {rank}", str(server.getsockname()[1]))
        to = (nodes[after].address, int(store.get(f"port {after}")))
        forward = open_sockets.enter_context(socket.create_connection(to))
        back = open_sockets.enter_context(server.accept()[0])
        trips = [0.0]
        for _trip in range(21):
            start = time.perf_counter()
            if rank == 0:
                forward.send(b"x")
                forward.recv(1)
            elif rank == 1:
                back.send(back.recv(1))
            trips.append(time.perf_counter() - start)
        sender = threading.Thread(target=send_for, args=(forward, TRANSFER_S))
        store.set(f"ready {rank}", "")
        store.wait([f"ready {other}" for other in range(ranks)])
        sender.start()
        rate = received_rate(back)
        sender.join()
    return rate, statistics.median(trips) * 1e3


def send_for(to: socket.socket, seconds: float) -> None:
    part, end = bytes(1 << 18), time.perf_counter() + seconds
    while time.perf_counter() < end:
        to.sendall(part)
    to.shutdown(socket.SHUT_WR)


def received_rate(source: socket.socket) -> float:
    """Megabits per second until the other end has sent all."""
    part, total, start = bytearray(1 << 18), 0, time.perf_counter()
    while count := source.recv_into(part):
        total += count
    return total * 8e-6 / (time.perf_counter() - start)


def now() -> tuple[float, float, int]:
    return time.perf_counter(), time.process_time(), sent_bytes()


def measure(
    rank: int,
    ranks: int,
    _: Any,
    *,
    nodes: Sequence[Node],
    contestants: list[str],
    repetitions: int,
    work: Work,
) -> tuple[tuple[float, float], dict[str, list[Taken]]]:
    """What `transfer` gives, and what each step of each contestant took on this rank, in turn."""
    node = nodes[rank]
    enter(node)
    store = dist.TCPStore(node.master, PORT, ranks, is_master=rank == 0)
    speed = transfer(rank, nodes, store)
    built = build(contestants, work, rank, store, node.master)
    found: dict[str, list[Taken]] = {name: [] for name in built}
    for repetition in range(repetitions + 1):
        for name, contestant in built.items():
            dist.barrier()
            before = now()
            contestant.run(STEPS)
            dist.barrier()
            if repetition:
                spent = (after - start for start, after in zip(before, now(), strict=True))
                found[name].append(Taken(*(each / STEPS for each in spent)))
    dist.destroy_process_group()
    return speed, found
