"""A publisher with nothing to publish wakes no thread, and publishes at once what comes then."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.common.config import Settings
from services.common.kafka import publisher as module
from services.common.kafka.publisher import Publisher
from services.common.kafka.records import OutgoingRecord

MOCK: dict[str, Any] = {"test.mock.num.brokers": 1, "allow.auto.create.topics": True}


async def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_an_idle_publisher_sleeps_until_there_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.005)
    monkeypatch.setattr(module, "_SLEEP_SECONDS", 60.0)
    publisher = Publisher(Settings(kafka_bootstrap="127.0.0.1:1"), "test", **MOCK)
    publisher.start()
    for number in range(5):
        await until(lambda: publisher._sleeping)
        record = OutgoingRecord("task.created", b"k" * 16, b"%d" % number, [])
        assert await asyncio.wait_for(publisher.publish([record]), 10) == []
        refused = OutgoingRecord("task.created", b"k", 5, [])  # type: ignore[arg-type]
        await until(lambda: publisher._sleeping)
        assert await asyncio.wait_for(publisher.publish([refused]), 10)
    await until(lambda: publisher._sleeping)
    started = time.monotonic()
    assert await publisher.close(30)
    assert time.monotonic() - started < 10
