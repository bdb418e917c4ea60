"""The fault proxy over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxies


@pytest.fixture
def echo() -> Iterator[int]:
    """Yield the port of a server that returns what it receives."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk(client: socket.socket) -> None:
        with client:
            try:
                while data := client.recv(4096):
                    client.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(client,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield int(server.getsockname()[1])
    server.close()


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    made = Proxies()
    yield made
    made.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def test_pass(proxies: Proxies, echo: int) -> None:
    port = proxies.add("a", "127.0.0.1", echo)
    with connect(port) as client:
        client.sendall(b"x" * 200_000)
        client.shutdown(socket.SHUT_WR)
        got = b""
        while data := client.recv(65536):
            got += data
    assert got == b"x" * 200_000, "all data, then the end"


def test_reset_ends_open_connections_with_a_rst(proxies: Proxies, echo: int) -> None:
    port = proxies.add("a", "127.0.0.1", echo)
    with connect(port) as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"
        proxies.set("a", "reset")
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    proxies.set("a", "pass")
    with connect(port) as client:
        client.sendall(b"two")
        assert client.recv(10) == b"two"


def test_blackhole_holds_the_data_back_until_it_is_over(proxies: Proxies, echo: int) -> None:
    port = proxies.add("a", "127.0.0.1", echo)
    with connect(port) as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"
        proxies.set("a", "blackhole")
        client.sendall(b"two")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(10)
        proxies.set("a", "pass")
        client.settimeout(5)
        assert client.recv(10) == b"two"


def test_slow_delays_each_piece(proxies: Proxies, echo: int) -> None:
    port = proxies.add("a", "127.0.0.1", echo)
    proxies.set("a", "slow")
    with connect(port) as client:
        began = time.monotonic()
        client.sendall(b"one")
        assert client.recv(10) == b"one"
        assert time.monotonic() - began > 0.25


def test_a_connection_to_a_missing_server_is_reset(proxies: Proxies) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = int(free.getsockname()[1])
    port = proxies.add("a", "127.0.0.1", nobody)
    # The proxy accepts the connection, then resets it. `connect` itself may see that already.
    with pytest.raises(ConnectionResetError), connect(port) as client:
        client.recv(10)


def test_each_link_has_a_mode_of_its_own(proxies: Proxies, echo: int) -> None:
    left, right = proxies.add("a", "127.0.0.1", echo), proxies.add("b", "127.0.0.1", echo)
    proxies.set("a", "blackhole")
    with connect(right) as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"
    with connect(left) as client:
        client.settimeout(0.3)
        client.sendall(b"one")
        with pytest.raises(TimeoutError):
            client.recv(10)
    proxies.set("a", "pass")
