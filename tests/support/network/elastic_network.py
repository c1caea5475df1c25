"""Nodes in network namespaces of their own, joined by a switch whose cables can be pulled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """A hub, where the Lighthouse runs, and nodes. All reach each other until they are cut off."""

    def __init__(self, nodes: str) -> None:
        self._prefix = f"hf{os.getpid() % 10000}"
        self._nodes = nodes

    def make(self) -> None:
        """Lay the cables. Needs root, and iproute2; CalledProcessError or OSError without."""
        _ip("netns", "add", self.name("hub"))
        for bridge in ("near", "far"):
            self._hub("link", "add", bridge, "address", "02:00:00:00:00:01", "type", "bridge")
            self._hub("link", "set", bridge, "up")
        self._hub("addr", "add", f"{self.address('hub')}/24", "dev", "near")
        self._hub("link", "set", "lo", "up")
        for node in self._nodes:
            name = self.name(node)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", node)
            _ip("-n", name, "link", "set", "dev", node, "netns", self.name("hub"))
            _ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            self._hub("link", "set", "dev", node, "master", "near", "up")

    def name(self, node: str) -> str:
        """The namespace of a node, or of `hub`."""
        return f"{self._prefix}-{node}"

    @property
    def size(self) -> int:
        """Nodes, the hub apart."""
        return len(self._nodes)

    def node(self, number: int) -> str:
        return self._nodes[number]

    def address(self, node: str) -> str:
        return f"10.77.3.{254 if node == 'hub' else 1 + self._nodes.index(node)}"

    @property
    def hub(self) -> tuple[str, str]:
        return self.address("hub"), self.name("hub")

    def cut(self, nodes: str) -> None:
        """Part these nodes from the hub and the others; they still reach each other."""
        for node in nodes:
            self._hub("link", "set", "dev", node, "master", "far")

    def heal(self) -> None:
        """All reach each other again."""
        for node in self._nodes:
            self._hub("link", "set", "dev", node, "master", "near")

    def close(self) -> None:
        with suppress(FileNotFoundError):  # without `ip` nothing has been made
            for node in (*self._nodes, "hub"):
                subprocess.run(
                    ["ip", "netns", "del", self.name(node)], check=False, capture_output=True
                )

    def _hub(self, *arguments: str) -> None:
        _ip("-n", self.name("hub"), *arguments)


@contextmanager
def network(nodes: str) -> Iterator[Network]:
    """A network of nodes named by single letters; the test is skipped where none can be made."""
    made = Network(nodes)
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            pytest.skip(
                f"network namespaces cannot be made (root and iproute2 are needed): {reason}"
            )
        yield made
    finally:
        made.close()
