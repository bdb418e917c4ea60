"""The metadata of a call, and a long batch."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from postroad.v1.task_service_pb2 import BatchCreateRequest, CreateRequest, TaskData
from services.api import turns
from services.api.auth import ANYONE
from services.api.call import Call, Metadata, set_call
from services.api.task_service import TaskServicer


def test_a_metadata_key_with_two_values_has_none() -> None:
    metadata = Metadata([("a", "1"), ("b", "1"), ("b", "2"), ("c", "3"), ("c", "3")])
    assert metadata == {"a": "1", "c": "3"}
    assert metadata.repeated == {"b"}


async def test_a_long_batch_does_not_block_the_event_loop() -> None:
    async def record_batch(items: list[object]) -> list[None]:
        return [None] * len(items)

    recorder: Any = SimpleNamespace(record_batch=record_batch)
    unused: Any = None
    service = TaskServicer(recorder, unused, unused, unused, max_body=1000, keys=unused)
    set_call(Call("default", Metadata(()), 0, ANYONE))
    # Each takes some milliseconds to parse.
    senders = [", ".join(f"Ann <a{number}.{n}@example.org>" for n in range(20)) for number in range(30)]
    data = [TaskData(email="a@b.test", subject="s", body="", headers={"Reply-To": many}) for many in senders]
    request = BatchCreateRequest(requests=[CreateRequest(data=one) for one in data])
    batch = asyncio.create_task(service.BatchCreate(request, unused))
    taken = 0
    while not batch.done():
        taken += 1
        await asyncio.sleep(0)
    assert len(batch.result().results) == len(data)
    assert taken >= 5


async def test_items_give_others_their_turn_after_two_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))
    yields = 0

    async def others() -> None:
        nonlocal yields
        while True:
            await asyncio.sleep(0)
            yields += 1

    other = asyncio.create_task(others())
    seen = []
    async for item in turns.in_turns(range(40)):
        seen.append(item)
        now += 0.001
    other.cancel()
    assert seen == list(range(40))
    assert 10 <= yields <= 20
