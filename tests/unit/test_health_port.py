"""The HTTP port: bounded in connections, sizes and time, and its details are for operators."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from services.common.health import Degraded, HealthServer
from tests.api_process import eventually

TOKEN = "the-operators-token"


class Beating:
    """A heartbeat of a loop that runs."""

    def age(self) -> float:
        return 0.0


@pytest.fixture
def server() -> Iterator[HealthServer]:
    beating: Any = Beating()
    with HealthServer("127.0.0.1:0", TOKEN, beating, lambda: [Degraded("Kafka is away")]) as server:
        yield server


def ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.address, timeout=5)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def connect(server: HealthServer) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), 5)


def test_half_sent_requests_make_no_threads_and_keep_nobody_away(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None of them ends by itself.
    monkeypatch.setattr(server, "_SECONDS", 60.0)
    threads = threading.active_count()
    half = [connect(server) for _ in range(300)]
    for connection in half:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: ")
        assert connection.fileno() > 0
    assert ask(server, "/readyz")[0] == 200
    assert threading.active_count() == threads
    eventually(lambda: len(server._connections) <= server._MAX_CONNECTIONS, 5)
    for connection in half:
        connection.close()


def test_a_half_sent_request_ends(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SECONDS", 0.1)
    with connect(server) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\n")
        assert ended(connection)


def test_a_long_request_ends(server: HealthServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /" + b"x" * 20_000)
        assert ended(connection)


def test_a_client_that_does_not_read_ends(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SECONDS", 0.2)
    monkeypatch.setattr("services.common.health.choose_encoder", lambda _: (lambda _: bytes(64 << 20), "x"))
    with connect(server) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        eventually(lambda: not server._connections, 5)


def test_the_details_are_for_operators(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {"status": "degraded", "problems": ["Kafka is away"]}
    assert json.loads(ask(server, "/readyz")[1]) == shown
    assert ask(server, "/metrics")[0] == 200
    # From now on nobody seems to be on this host.
    monkeypatch.setattr("services.common.health.is_loopback", lambda _: False)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        assert ask(server, "/readyz", **headers) == (200, b'{"status": "degraded"}')
        assert ask(server, "/healthz", **headers) == (200, b'{"status": "ok"}')
        assert ask(server, "/metrics", **headers)[0] == 401
    operator = {"Authorization": f"Bearer {TOKEN}"}
    assert json.loads(ask(server, "/readyz", **operator)[1]) == shown
    assert b"python_info" in ask(server, "/metrics", **operator)[1]


def test_other_paths_and_methods(server: HealthServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/readyz", "POST")[0] == 405
    assert ask(server, "/readyz?x=1", "HEAD") == (200, b"")


def ended(connection: socket.socket) -> bool:
    """Return whether the server ends the connection within five seconds."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
