"""Measures when the system serves again: when a new task in each partition is completed."""

from __future__ import annotations

import asyncio
import time
from uuid import UUID

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc

__all__ = ["PARTITIONS", "partition", "serves_again"]

PARTITIONS = 12
_EVERY = 0.3


def _murmur2(data: bytes) -> int:
    """MurmurHash2 as Kafka's clients use it to choose a partition (seed 0x9747b28c)."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) - len(data) % 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def partition(id_: str) -> int:
    """Return the partition of a task, by its id as text."""
    return (_murmur2(UUID(id_).bytes) & 0x7FFFFFFF) % PARTITIONS


async def serves_again(targets: list[str], since: float, timeout: float) -> float | None:
    """Wait until a task created after `since` (Unix seconds) is completed in each partition.

    Returns the Unix seconds of that moment, or None after `timeout` seconds.
    """
    channels = [grpc.aio.insecure_channel(t, [("grpc.max_reconnect_backoff_ms", 500)]) for t in targets]
    stubs = [rpc.TaskServiceStub(channel) for channel in channels]
    start = Timestamp()
    start.FromMicroseconds(int(since * 1e6))
    served: set[int] = set()
    end = time.monotonic() + timeout
    turn = 0
    try:
        while time.monotonic() < end:
            turn += 1
            request = pb.ListRequest(status=["completed"], created_from=start, page_size=1000)
            try:
                page = await stubs[turn % len(stubs)].List(request, timeout=2)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_EVERY)
                continue
            served.update(partition(task.id) for task in page.results)
            if len(served) == PARTITIONS:
                return time.time()
            await asyncio.sleep(_EVERY)
        return None
    finally:
        for channel in channels:
            await channel.close()
