"""A stranger on another machine of the network gets nowhere with a run on several nodes."""

from __future__ import annotations

import signal
import subprocess
from ipaddress import ip_address

import pytest

from support.network.elastic_network import Network, network
from support.processes.stranger import listeners, obeyed_by
from support.runs.elastic_runs import Starter, Task, pace

pytestmark = [pytest.mark.mp]


def _inside(net: Network, place: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", net.name(place))


def _open_to_others(net: Network, node: str) -> list[str]:
    """What is listened on in a node at other addresses than the loopback, as others reach it."""
    tables = subprocess.run(
        [*_inside(net, node), "cat", "/proc/net/tcp", "/proc/net/tcp6"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = listeners([tables.stdout])
    return [
        f"{net.address(node)}:{port}" for host, port in found if not ip_address(host).is_loopback
    ]


def test_a_stranger_on_another_machine_gets_nowhere(start: Starter) -> None:
    with network("ab") as net:
        path = start.write(
            "strangers",
            train={"steps": 10_000, "global_batch": 2},
            model={"layers": 2},
            parallel={"data": 2},
            elastic=pace({}, 0.1),
        )
        other = start.task(path, "strangers", Task(net, 1))
        run = start.start(path, "strangers", task=Task(net, 0))
        run.wait_for_step(3)
        addresses = [address for node in "ab" for address in _open_to_others(net, node)]
        assert len(addresses) >= 3  # two stores and the Lighthouse, all behind doors
        assert obeyed_by(addresses, before=_inside(net, "hub")) == ""
        run.wait_until(lambda: bool(run.events("stranger_refused")), "strangers are told of")
        run.wait_for_step(len(run.steps()) + 3)
        assert run.events("rank_lost") == []
        for process in (run.process, other):
            process.send_signal(signal.SIGINT)
        assert [process.wait(60) for process in (run.process, other)] == [130, 130]
