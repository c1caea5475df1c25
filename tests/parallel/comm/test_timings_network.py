"""Ranks in network namespaces, of which one sends or receives slowly, or to one other alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.elastic.hang import HangLimits, silent_operations
from holdfast.parallel.comm.flight_recorder import FlightRecord, Operation
from holdfast.parallel.comm.groups import build_groups
from holdfast.parallel.comm.timings.matrix import delays
from holdfast.parallel.comm.timings.probe import probe
from holdfast.parallel.comm.timings.slow_links import slow_links
from holdfast.parallel.comm.timings.window import window_of
from holdfast.parallel.errors import PeerLost
from holdfast.trainer.config import convert_config
from holdfast.trainer.loop import train
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.worlds.world import local_world
from support.network.elastic_network import Network, network
from support.network.limited_links import (
    cut_direction,
    heal_direction,
    limit_direction,
    limit_receiving,
    limit_sending,
)
from support.network.namespaces import enter_network
from support.processes.cluster import Cluster

pytestmark = [pytest.mark.mp, pytest.mark.slow]

NODES = "abcd"
RANKS = len(NODES)
USUAL_MBIT, SLOW_MBIT = 400, 100
CUT_AFTER_S = 1.0
SLOW, AFTER = 2, 3
"""The rank whose network is limited, and the one that a single link leads to."""
FAULTS = {
    "none": [],
    "sender": [("sender", SLOW, None)],
    "receiver": [("receiver", None, SLOW)],
    "host": [("host", SLOW, SLOW)],
    "link": [("link", SLOW, AFTER)],
}
CONFIG = {
    "model": {
        "family": "llama",
        "layers": 4,
        "hidden": 96,
        "intermediate": 384,
        "heads": 4,
        "vocab": 256,
    },
    "train": {"steps": 32, "seq_len": 16, "global_batch": 4, "micro_batch": 1, "device": "cpu"},
    "parallel": {"data": RANKS},
    "elastic": {"straggler_every": 8},
    "optimizer": {"block_elements": 1 << 17},
}
Place = tuple[str, str, int]
"""A namespace, the address of rank 0, and the port of its store."""
_ports = itertools.count(20000)


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network(NODES) as made:
        try:
            limit(made, "none")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tc limits no rate here: {getattr(error, 'stderr', '') or error}")
        yield made


@pytest.fixture(scope="module")
def ranks() -> Iterator[Cluster]:
    made = Cluster(RANKS)
    yield made
    made.close()


def limit(net: Network, fault: str) -> None:
    """Limit all, and one of them more."""
    for node in NODES:
        limit_sending(net, node, USUAL_MBIT)
        limit_receiving(net, node, USUAL_MBIT)
    match fault:
        case "sender":
            limit_sending(net, NODES[SLOW], SLOW_MBIT)
        case "receiver":
            limit_receiving(net, NODES[SLOW], SLOW_MBIT)
        case "host":
            limit_sending(net, NODES[SLOW], SLOW_MBIT)
            limit_receiving(net, NODES[SLOW], SLOW_MBIT)
        case "link":
            limit_direction(net, NODES[SLOW], NODES[AFTER], SLOW_MBIT, USUAL_MBIT)


def places(net: Network) -> list[Place]:
    port, master = next(_ports), net.address(NODES[0])
    return [(net.name(node), master, port) for node in NODES]


def meet(rank: int, place: Place) -> torch.distributed.TCPStore:
    """Enter this rank's network, and meet the others there."""
    namespace, master, port = place
    enter_network(namespace)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    return torch.distributed.TCPStore(master, port, RANKS, is_master=rank == 0)


def try_links(rank: int, size: int, _: Any, *, at: Sequence[Place]) -> Any:
    """What a rank concludes when links are tried, and the delays from which it does."""
    store = meet(rank, at[rank])
    groups = build_groups(store, at[0][1], rank, range(size), {}, backend="gloo", generation=1)
    groups.world.barrier()
    since = groups.recorder.begin_window()
    probe(groups.world, [(SLOW, AFTER)], 1 << 19, torch.device("cpu"))
    window = window_of(groups.control, groups.recorder, since, rank)
    assert window.shares_clock
    groups.world.barrier()
    found = delays(window.messages)
    told = [(link.side, link.source, link.destination) for link in slow_links(found, 1.5)]
    return told, {edge: delay.ratio for edge, delay in found.items()}


def train_here(rank: int, size: int, _: Any, *, at: Sequence[Place], root: str) -> None:
    store = meet(rank, at[rank])
    world = replace(local_world(rank, size), store_host=at[0][1])
    train(convert_config(CONFIG), world, store, RunDirectory(Path(root)))


def exchange_until_cut(
    rank: int, size: int, _: Any, *, at: Sequence[Place], begun: str
) -> tuple[Operation, ...]:
    """What a rank's flight record has some seconds after it began to exchange with all."""
    store = meet(rank, at[rank])
    groups = build_groups(store, at[0][1], rank, range(size), {}, backend="gloo", generation=1)

    def exchange() -> None:
        parts = [torch.zeros(1 << 18) for _ in range(size)]
        with contextlib.suppress(PeerLost):
            groups.world.barrier()
            Path(begun).touch()
            while True:
                groups.world.all_gather(parts, parts[rank]).wait()

    thread = threading.Thread(target=exchange)
    thread.start()
    time.sleep(CUT_AFTER_S + 5)
    operations = tuple(groups.recorder.record().operations)
    groups.abort("the test is over")
    thread.join()
    return operations


@pytest.mark.parametrize("fault", FAULTS)
def test_what_tc_limits_is_what_is_named_when_links_are_tried(
    net: Network, ranks: Cluster, fault: str
) -> None:
    limit(net, fault)
    results = ranks.run("test_timings_network:try_links", RANKS, at=places(net))
    for told, matrix in results:
        assert told == FAULTS[fault], matrix
        assert len(matrix) == RANKS * (RANKS - 1)


def test_a_link_that_is_cut_is_told_as_one_that_hangs(
    net: Network, ranks: Cluster, tmp_path: Path
) -> None:
    limit(net, "none")
    ends, begun = (NODES[SLOW], NODES[AFTER]), tmp_path / "begun"

    def cut_later() -> None:
        while not begun.exists():
            time.sleep(0.05)
        time.sleep(CUT_AFTER_S)
        cut_direction(net, *ends)

    cut = threading.Thread(target=cut_later, daemon=True)
    cut.start()
    try:
        results = ranks.run(
            "test_timings_network:exchange_until_cut",
            RANKS,
            at=places(net),
            begun=str(begun),
        )
    finally:
        cut.join()
        heal_direction(net, *ends)
    records = [
        FlightRecord(rank, 1, 1, 1, 0.0, operations, (0.0, 0.1))
        for rank, operations in enumerate(results)
    ]
    now_s = max(o.waited_s for operations in results for o in operations if o.is_waited_for) + 2
    found = silent_operations(records, lambda moment_s: now_s - moment_s, HangLimits(1.0))
    links = {silent.link for silent in found} - {None}
    assert links, [silent.describe() for silent in found]
    assert links <= {(SLOW, AFTER), (AFTER, SLOW)}, [silent.describe() for silent in found]
    assert {silent.rank for silent in found if silent.link} <= {SLOW, AFTER}


def test_a_run_names_the_rank_whose_sending_tc_limits(
    net: Network, ranks: Cluster, tmp_path: Path
) -> None:
    limit(net, "sender")
    ranks.run(
        "test_timings_network:train_here",
        RANKS,
        at=places(net),
        root=str(tmp_path),
        timeout_s=200,
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (slow,) = [event for event in events if event["event"] == "slow_link"]
    assert (slow["side"], slow["source"], slow["destination"]) == ("sender", SLOW, None)
    assert slow["ratio"] == pytest.approx(USUAL_MBIT / SLOW_MBIT, rel=0.4)
    assert slow["excess_s"] > 0
    assert slow["message"].startswith(f"the sending side of rank {SLOW} is slow: ")
