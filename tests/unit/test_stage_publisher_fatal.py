"""A producer that librdkafka has declared broken is noticed, and what it had in hand is answered."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import confluent_kafka
from confluent_kafka import Producer

from services.common.config import Settings
from services.common.events import Outgoing
from services.common.stage.publisher import Publisher

INCONSISTENT = -149
ITEM = Outgoing("task.created", b"k" * 16, b"value", [])


def break_down(producer: Producer) -> None:
    """Make the client library report a fatal error, as it does where it has lost count of its batches."""
    (library,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    fail = ctypes.CDLL(str(library)).rd_kafka_test_fatal_error
    fail.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p]
    # The handle is the first field after the head of every Python object (a count and a type).
    handle = ctypes.c_void_p.from_address(id(producer) + 2 * ctypes.sizeof(ctypes.c_void_p))
    assert fail(handle.value, INCONSISTENT, b"for the test") == 0


async def test_a_fatal_error_is_told_and_nobody_waits_for_ever() -> None:
    publisher = Publisher(Settings(kafka_bootstrap="127.0.0.1:1"), "test")
    publisher.start()
    try:
        before = publisher.attempt([ITEM, ITEM])
        break_down(publisher._producer)
        await asyncio.wait_for(publisher.broken.wait(), 10)
        assert publisher.fatal is not None
        assert "for the test" in publisher.fatal
        assert [index for index, _ in await asyncio.wait_for(before, 10)] == [0, 1]
        after = await asyncio.wait_for(publisher.attempt([ITEM]), 10)
        assert [index for index, _ in after] == [0]
    finally:
        await publisher.close(1)
