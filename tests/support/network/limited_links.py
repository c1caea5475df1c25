"""Links of limited rate between the nodes of a network."""

from __future__ import annotations

import subprocess

from support.network.elastic_network import Network


def limit_node(net: Network, node: str, mbit: int) -> None:
    """Limit what a node sends and receives, to and from all others."""
    limit_sending(net, node, mbit)
    limit_receiving(net, node, mbit)


def limit_link(net: Network, ends: str, mbit: int, others_mbit: int) -> None:
    """Limit what two nodes send to each other; what they send elsewhere has another limit."""
    for node, other in (ends, ends[::-1]):
        limit_direction(net, node, other, mbit, others_mbit)


def _bucket(mbit: int) -> str:
    return f"rate {mbit}mbit burst 70000 limit 200000"


def _tc(net: Network, place: str, arguments: str) -> None:
    command = ["tc", "-n", net.name(place), *arguments.split()]
    subprocess.run(command, check=True, capture_output=True, text=True)


def limit_sending(net: Network, node: str, mbit: int) -> None:
    """Limit what a node sends, to all others."""
    _tc(net, node, f"qdisc replace dev eth0 root tbf {_bucket(mbit)}")


def limit_receiving(net: Network, node: str, mbit: int) -> None:
    """Limit what a node receives, from all others."""
    _tc(net, "hub", f"qdisc replace dev {node} root tbf {_bucket(mbit)}")


def limit_direction(net: Network, source: str, target: str, mbit: int, others_mbit: int) -> None:
    """Limit what one node sends to another; what it sends elsewhere has another limit."""
    _tc(net, source, "qdisc replace dev eth0 root handle 1: htb default 10 r2q 1000")
    for number, rate in ((10, others_mbit), (20, mbit)):
        _tc(
            net,
            source,
            f"class add dev eth0 parent 1: classid 1:{number} htb rate {rate}mbit "
            "burst 70000 cburst 70000",
        )
    to = f"{net.address(target)}/32"
    _tc(net, source, f"filter add dev eth0 parent 1: protocol ip u32 match ip dst {to} flowid 1:20")


def cut_direction(net: Network, source: str, target: str) -> None:
    """Drop all that one node sends to another."""
    command = f"ip -n {net.name(source)} route add blackhole {net.address(target)}/32"
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def heal_direction(net: Network, source: str, target: str) -> None:
    """Undo `cut_direction`."""
    command = f"ip -n {net.name(source)} route del blackhole {net.address(target)}/32"
    subprocess.run(command.split(), check=True, capture_output=True, text=True)
