"""CallQueue: one call at a time, at once when idle, with more items when they come fast."""

from __future__ import annotations

import asyncio

from services.sender.call_queue import CallQueue


async def test_an_idle_queue_calls_in_the_next_turn_with_all_items_of_this_one() -> None:
    calls: list[list[int]] = []

    async def call(items: list[int]) -> None:
        calls.append(items)

    queue = CallQueue(call)
    for item in range(3):
        queue.add(item)
    assert calls == []
    await asyncio.sleep(0)
    assert calls == [[0, 1, 2]]


async def test_what_arrives_during_a_call_makes_the_next_one() -> None:
    calls: list[list[int]] = []
    go = asyncio.Event()

    async def call(items: list[int]) -> None:
        calls.append(items)
        await go.wait()

    queue = CallQueue(call)
    queue.add(0)
    await asyncio.sleep(0)
    for item in range(1, 700):
        queue.add(item)
    await asyncio.sleep(0.02)
    assert calls == [[0]]
    go.set()
    async with asyncio.timeout(30):
        while len(calls) < 3:  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0.001)
    assert [len(items) for items in calls] == [1, 500, 199]


async def test_items_that_come_fast_one_by_one_are_gathered() -> None:
    calls: list[list[int]] = []

    async def call(items: list[int]) -> None:
        calls.append(items)

    queue = CallQueue(call)
    for item in range(3000):
        queue.add(item)
        await asyncio.sleep(0)
    async with asyncio.timeout(30):
        while sum(map(len, calls)) < 3000:  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0.001)
    assert [item for items in calls for item in items] == list(range(3000))
    # The first half thousand or so come before the queue knows the rate.
    assert len(calls) < 1500
