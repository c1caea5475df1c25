"""What is asked again and again, or in a recovery, is asked on connections that are kept."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import cast

import pytest
from torch.distributed import Store

from holdfast.elastic.generation import Identity
from holdfast.elastic.lighthouse import LighthouseAway, StatusPage
from holdfast.elastic.store import StoreClients
from holdfast.parallel.links import StoreAccess, Tunnels, derived_key, host_store

KEY = derived_key("a secret of this test", "store")
PAGES = 3
"""The pages after which the server here ends a connection."""


class Ways:
    """The way to the stores; counts connections, and can be cut."""

    def __init__(self) -> None:
        self.made = 0
        self._tunnels = Tunnels()

    def connect(self, address: str, timeout_s: float) -> Store:
        self.made += 1
        return StoreAccess(self._tunnels, KEY).connect(address, timeout_s)

    def close(self) -> None:
        self._tunnels.close()

    def cut(self) -> None:
        self._tunnels.close()
        self._tunnels = Tunnels()


def test_a_new_generation_at_the_same_store_makes_no_connection() -> None:
    store, address = host_store("127.0.0.1", KEY)
    with closing(store), closing(Ways()) as ways:
        clients = StoreClients(cast("StoreAccess", ways))

        def used(generation: str) -> int:
            """The connections that were made, after both of a generation were used."""
            met = clients.at(address, generation)
            met.set("who", generation)
            assert met.clone().get("who") == generation.encode()  # below the same prefix
            return ways.made

        assert [used("1"), used("2"), used("3")] == [2, 2, 2]
        ways.cut()
        assert used("4") == 4


@contextmanager
def status_server() -> Iterator[tuple[str, list[int]]]:
    """The address of a server of status pages, and the ports of its clients so far."""
    clients: list[int] = []

    class Pages(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.left = PAGES
            clients.append(self.client_address[1])

        def do_GET(self) -> None:
            page = b"run:3: seen 0.25s ago\n"
            self.send_response(200 if self.path == "/status" else 404)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            self.left -= 1
            self.close_connection = not self.left

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "http://{}:{}".format(*server.server_address), clients
        finally:
            server.shutdown()
            thread.join()


def test_ages_of_heartbeats_are_asked_for_on_one_connection_until_it_ends() -> None:
    with status_server() as (address, clients):
        page = StatusPage(address)
        for made in [1] * PAGES + [2]:
            assert page.ages("run") == {Identity(3): 0.25}
            assert len(clients) == made
    with closing(page):
        for _ in range(PAGES - 1):
            page.ages("run")  # the thread of the last connection is still there
        with pytest.raises(LighthouseAway):
            page.ages("run")
