"""The gRPC health service: what it tells depends on no client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.api import health
from services.api.health import HealthServicer
from tests.api_process import eventually
from tests.http2 import Connection, message

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
WATCH = f"{health.SERVICE_NAME}/Watch"


@pytest.fixture
async def served() -> AsyncIterator[tuple[HealthServicer, str]]:
    servicer = HealthServicer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((servicer.handler(),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer, target
    await server.stop(None)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the server's handlers have made the condition true."""
    await asyncio.to_thread(eventually, condition)


async def test_watchers_that_read_nothing_hold_up_no_change(served: tuple[HealthServicer, str]) -> None:
    servicer, target = served
    with Connection(target, window=0) as connection:
        for _ in range(100):
            connection.call(WATCH, message(b""))
        async with grpc.aio.insecure_channel(target) as channel, asyncio.timeout(10):
            stub = health_pb2_grpc.HealthStub(channel)
            stream = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await stream.read()).status == NOT_SERVING
            await until(lambda: servicer._watches.count >= 101)
            servicer.set(True)
            assert (await stream.read()).status == SERVING
            servicer.drain()
            servicer.set(True)
            assert (await stream.read()).status == NOT_SERVING
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="postroad.v1.TaskService"))
            assert answer.status == NOT_SERVING


async def test_one_watch_too_many_is_refused_until_another_ends(
    served: tuple[HealthServicer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, target = served
    monkeypatch.setattr(health, "MAX_CALLS", 10)
    with Connection(target, window=0) as connection:
        for _ in range(10):
            connection.call(WATCH, message(b""))
        await until(lambda: servicer._watches.count >= 10)
        async with grpc.aio.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert await stub.Watch(health_pb2.HealthCheckRequest()).code() is EXHAUSTED
            # Watches keep no Check away.
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
    async with grpc.aio.insecure_channel(target) as channel, asyncio.timeout(10):
        await until(lambda: not servicer._watches.count)
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await stream.read()).status == NOT_SERVING
