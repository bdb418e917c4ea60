"""The api's gRPC server with its tokens and certificates, before a task service without a database."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from postroad.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from services.api.access import Access
from services.api.bounded_io import StreamWriter
from services.api.call import Call, current_call
from services.api.health import HealthServicer
from services.api.interceptor import RequestInterceptor
from services.api.server import make_server
from services.common.config import Settings
from services.common.grants import SCOPES, Grant, format_grant, token_digest

__all__ = ["Code", "Served", "bearer", "call", "grant_line", "serve", "until", "write_tokens"]

Code = grpc.StatusCode


class Served:
    """A server that runs: its address, its access, and the calls that it answered."""

    def __init__(self, target: str, access: Access, calls: list[Call]) -> None:
        self.target, self.access, self.calls = target, access, calls


@asynccontextmanager
async def serve(**settings: Any) -> AsyncIterator[Served]:
    """Serve inside the `async with` block, with these settings, on a free port of 127.0.0.1."""
    calls: list[Call] = []
    access = Access(Settings(**{"listen": "127.0.0.1:0"} | settings))
    interceptor = RequestInterceptor(access.authenticator, access.streams, _admit)
    servicer: Any = _TaskServicer(calls)
    server, port = make_server(
        "127.0.0.1:0",
        servicer,
        interceptor,
        HealthServicer(),
        accept_compression=False,
        reflect=access.reflect,
        credentials=access.credentials(),
    )
    await server.start()
    running = asyncio.create_task(access.run())
    try:
        yield Served(f"127.0.0.1:{port}", access, calls)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await server.stop(0)


def token_of(id_: str) -> str:
    return f"{id_}-{'x' * 30}"


def grant_line(
    id_: str, tenant: str = "shop", scopes: str = ",".join(SCOPES), seconds: float | None = None
) -> str:
    end = time.time() + seconds if seconds is not None else float("inf")
    return format_grant(Grant(id_, tenant, token_digest(token_of(id_)), frozenset(scopes.split(",")), end))


def write_tokens(path: Path, *lines: str) -> str:
    """Replace a file in one step, as `postroad token` does."""
    new = path.with_name("new")
    new.write_text("".join(f"{line}\n" for line in ("# tokens", *lines)))
    new.replace(path)
    return str(path)


def bearer(id_: str, **more: str) -> list[tuple[str, str]]:
    return [
        ("authorization", f"Bearer {token_of(id_)}"),
        *((key.replace("_", "-"), value) for key, value in more.items()),
    ]


async def call(channel: grpc.aio.Channel, rpc: str, metadata: Any = None) -> tuple[Code, str]:
    """Return the code and the reason of a call; a Watch counts as OK with its first message."""
    stub = task_service_pb2_grpc.TaskServiceStub(channel)  # type: ignore[arg-type]
    method: Any = getattr(stub, rpc)
    request = getattr(task_service_pb2, f"{rpc}Request")()
    try:
        if rpc == "Watch":
            stream = method(request, metadata=metadata, timeout=30)
            await stream.read()
            stream.cancel()
        else:
            await method(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        info = error_details_pb2.ErrorInfo()
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        if status is not None:
            any(detail.Unpack(info) for detail in status.details)
        return error.code(), info.reason
    return Code.OK, ""


async def until(condition: Any) -> Any:
    """Return the condition's first true value; it may be a coroutine's."""
    async with asyncio.timeout(30):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.05)


class _TaskServicer(task_service_pb2_grpc.TaskServiceServicer):
    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls

    async def Watch(self, request: Any, context: Any) -> None:
        self._calls.append(current_call())
        await StreamWriter(context).write(b"")
        await asyncio.Event().wait()


def _answering(rpc: str, response: Any) -> Any:
    async def answer(self: _TaskServicer, request: Any, context: Any) -> Any:
        self._calls.append(current_call())
        return response

    answer.__name__ = rpc
    return answer


for _rpc, _response in {
    "Create": task_pb2.Task(),
    "BatchCreate": task_service_pb2.BatchCreateResponse(),
    "Get": task_pb2.Task(),
    "List": task_service_pb2.ListResponse(),
    "Count": task_service_pb2.CountResponse(),
    "Retry": task_pb2.Task(),
    "Cancel": task_pb2.Task(),
    "Resolve": task_pb2.Task(),
}.items():
    setattr(_TaskServicer, _rpc, _answering(_rpc, _response))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _admit(_: int) -> AbstractContextManager[None]:
    return _nothing()
