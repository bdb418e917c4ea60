"""The load: Creates or BatchCreates as fast as their callers get answers, or Creates at a steady rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grpc
import uvloop

from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc

__all__ = ["Sent", "at_rate", "by_batches", "by_callers", "run"]

T = TypeVar("T")

# grpc.aio wakes the loops that it once knew, so one loop serves the whole process.
_runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)

# The size of a short notice.
BODY = ("Dear customer, your order has left our warehouse today.\n" * 7)[:340]


@dataclass(slots=True)
class Sent:
    """What the callers saw: by task id the wall-clock second of the call; and each call's seconds."""

    called_at: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns; blocks until then."""
    return _runner.run(coroutine)


def _anyone(number: int) -> str:
    return f"user{number}@d{number % 50}.ok.test"


def _mail(number: int, recipient: Callable[[int], str] = _anyone) -> pb.TaskData:
    return pb.TaskData(
        email=recipient(number), subject=f"Your order {number:08d} has been shipped", body=BODY
    )


async def _timed(call: Callable[[], Awaitable[T]], sent: Sent) -> T | None:
    """Return what a call answers, with its seconds noted; None, with its error noted, where it fails."""
    start = time.perf_counter()
    try:
        answer = await call()
    except grpc.aio.AioRpcError as error:
        sent.errors.append(f"{error.code().name}: {error.details()}")
        return None
    sent.seconds.append(time.perf_counter() - start)
    return answer


async def _call(
    stub: rpc.TaskServiceAsyncStub, number: int, sent: Sent, recipient: Callable[[int], str] = _anyone
) -> None:
    request, wall = pb.CreateRequest(data=_mail(number, recipient)), time.time()
    task = await _timed(partial(stub.Create, request, timeout=30), sent)
    if task is not None:
        sent.called_at[task.id] = wall


def _channels(targets: list[str]) -> list[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    return [grpc.aio.insecure_channel(target, options) for target in targets]


async def by_callers(targets: list[str], tasks: int, callers: int) -> Sent:
    """Create `tasks` tasks from `callers` concurrent callers, each waiting for its answer before the next."""
    sent, numbers = Sent(), iter(range(tasks))
    channels = _channels(targets)
    stubs = [rpc.TaskServiceStub(channel) for channel in channels]

    async def caller(index: int) -> None:
        for number in numbers:
            await _call(stubs[index % len(stubs)], number, sent)

    await asyncio.gather(*(caller(index) for index in range(callers)))
    await asyncio.gather(*(channel.close() for channel in channels))
    return sent


async def by_batches(targets: list[str], tasks: int, callers: int, size: int) -> Sent:
    """Create `tasks` tasks by BatchCreate, `size` in each, from `callers` concurrent callers."""
    sent, starts = Sent(), iter(range(0, tasks, size))
    channels = _channels(targets)
    stubs = [rpc.TaskServiceStub(channel) for channel in channels]

    async def caller(index: int) -> None:
        stub = stubs[index % len(stubs)]
        for first in starts:
            numbers = range(first, min(first + size, tasks))
            request = pb.BatchCreateRequest(requests=[pb.CreateRequest(data=_mail(n)) for n in numbers])
            wall = time.time()
            answer = await _timed(partial(stub.BatchCreate, request, timeout=30), sent)
            if answer is None:
                continue
            sent.errors += [result.error.message for result in answer.results if result.HasField("error")]
            sent.called_at |= {r.task.id: wall for r in answer.results if r.HasField("task")}

    await asyncio.gather(*(caller(index) for index in range(callers)))
    await asyncio.gather(*(channel.close() for channel in channels))
    return sent


async def at_rate(
    targets: list[str],
    rate: float,
    seconds: float,
    recipient: Callable[[int], str] = _anyone,
    first: int = 0,
) -> Sent:
    """Create `rate` tasks a second for `seconds`, whether or not earlier ones were answered.

    They are numbered from `first`; `recipient` gives the address for a number.
    """
    sent = Sent()
    channels = _channels(targets)
    stubs = [rpc.TaskServiceStub(channel) for channel in channels]
    calls, start = [], time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        stub = stubs[number % len(stubs)]
        calls.append(asyncio.create_task(_call(stub, first + number, sent, recipient)))
    await asyncio.gather(*calls)
    await asyncio.gather(*(channel.close() for channel in channels))
    return sent
