"""Clients without a token that read nothing, finish nothing, or send what grows in memory."""

from __future__ import annotations

import gzip
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from postroad.v1.task_service_pb2 import WatchRequest
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from tests.api_process import ApiProcess, Installation, eventually, request
from tests.forms import by_form
from tests.http2 import Connection, message
from tests.reflection_client import ReflectionClient
from tests.stack import Infra

TASKS = "postroad.v1.TaskService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
TOKEN, OTHERS_TOKEN = "of-the-shop", "of-the-bank"
DRAIN_SECONDS = 2
MAX_GROWTH = 64
"""Megabytes."""


@pytest.fixture(scope="module")
def installation(infra: Infra) -> Installation:
    return Installation(infra)


def started(installation: Installation) -> ApiProcess:
    return ApiProcess(
        installation,
        POSTROAD_API_TOKENS=f"shop:{TOKEN},bank:{OTHERS_TOKEN}",
        POSTROAD_DRAIN_SECONDS=str(DRAIN_SECONDS),
    )


@pytest.fixture(scope="module")
def api(installation: Installation) -> Iterator[ApiProcess]:
    with started(installation) as process:
        # The first call allocates what stays.
        assert answers(process)
        yield process


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Let this process open as many connections as the tests need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("metadata", [{}, {"authorization": f"Bearer {TOKEN}"}], ids=["stranger", "tenant"])
def test_the_drain_waits_for_no_client_that_reads_nothing(
    installation: Installation, metadata: dict[str, str]
) -> None:
    methods = (f"{HEALTH}/Watch", f"{HEALTH}/Check", f"{TASKS}/List", f"{TASKS}/Watch", REFLECTION)
    with started(installation) as api, Connection(api.target, window=0) as connection:
        for number in range(100):
            connection.call(methods[number % 5], message(b""), metadata)
        # A client that reads is served meanwhile.
        assert answers(api)
        begin = time.monotonic()
        assert api.stop() == 0, api.log()
        assert time.monotonic() - begin < DRAIN_SECONDS + 5


def test_a_tenant_that_reads_nothing_keeps_no_other_from_watching(api: ApiProcess) -> None:
    ours, theirs = ({"authorization": f"Bearer {token}"} for token in (TOKEN, OTHERS_TOKEN))
    with (
        Connection(api.target, window=0) as connection,
        grpc.insecure_channel(api.target) as channel,
    ):
        stub = TaskServiceStub(channel)
        noisy = stub.Create(request(1), metadata=[*ours.items()])
        quiet = stub.Create(request(2), metadata=[*theirs.items()])
        for _ in range(by_form(20, 100)):
            connection.call(f"{TASKS}/Watch", message(WatchRequest(id=noisy.id).SerializeToString()), ours)
        stream = stub.Watch(WatchRequest(id=quiet.id), metadata=[*theirs.items()], timeout=15)
        assert next(stream).task.id == quiet.id
        stream.cancel()


@pytest.mark.parametrize("method", [f"{TASKS}/Create", f"{TASKS}/Watch", f"{HEALTH}/Check", REFLECTION])
def test_a_compressed_request_is_refused(api: ApiProcess, method: str) -> None:
    bomb = message(gzip.compress(bytes(32 << 20)), compressed=True)
    before = memory(api)
    for _ in range(by_form(40, 1000)):
        with Connection(api.target) as connection:
            stream = connection.call(method, bomb, {"grpc-encoding": "gzip"})
            assert connection.ended(stream, 10)
    assert memory(api) - before < MAX_GROWTH
    assert answers(api)


def test_a_tenants_compressed_request_is_refused(api: ApiProcess) -> None:
    metadata = [("authorization", f"Bearer {TOKEN}")]
    with grpc.insecure_channel(api.target, compression=grpc.Compression.Gzip) as channel:
        stub = TaskServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Create(request(1, body="x" * 100_000), metadata=metadata, timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "method", [f"{TASKS}/Create", f"{TASKS}/BatchCreate", f"{TASKS}/Watch", f"{HEALTH}/Check", REFLECTION]
)
def test_an_unfinished_message_without_a_token_is_not_read(api: ApiProcess, method: str) -> None:
    before = memory(api)
    unfinished = message(bytes(50_000), size=4 << 20)
    connections = []
    for _ in range(by_form(50, 1000)):
        connections.append(connection := Connection(api.target))
        stream = connection.call(method, unfinished, end=False)
        assert connection.ended(stream, 10)
    assert memory(api) - before < MAX_GROWTH
    assert answers(api)
    for connection in connections:
        connection.close()


def test_idle_connections_take_little_memory(api: ApiProcess) -> None:
    before = memory(api)
    host, _, port = api.target.rpartition(":")
    with ReflectionClient(api.target, metadata=[("authorization", f"Bearer {TOKEN}")]) as client:
        client.call(f"{TASKS}/Count", {}, metadata=[("authorization", f"Bearer {TOKEN}")])
        idle = [socket.create_connection((host, int(port))) for _ in range(by_form(500, 5000))]
        # A client that is connected already is served meanwhile.
        client.call(f"{TASKS}/Count", {}, metadata=[("authorization", f"Bearer {TOKEN}")])
        assert memory(api) - before < MAX_GROWTH
    # None of them has said a word, and the handshake has ten seconds.
    eventually(lambda: all(map(is_closed, idle)), 20)


def answers(api: ApiProcess) -> bool:
    """Return whether the api answers a client with a token."""
    with ReflectionClient(api.target, metadata=[("authorization", f"Bearer {TOKEN}")]) as client:
        client.call(f"{TASKS}/Count", {}, metadata=[("authorization", f"Bearer {TOKEN}")])
        return client.call(f"{HEALTH}/Check", {}) == {"status": "SERVING"}


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def memory(api: ApiProcess) -> float:
    """Return the api's resident memory in megabytes."""
    assert api.process is not None
    status = Path(f"/proc/{api.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
