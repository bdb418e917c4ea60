"""A time limit that calls share ends each of them as asyncio.timeout would."""

from __future__ import annotations

import asyncio

import pytest

from services.api.time_limit import TimeLimit


async def wait(limit: TimeLimit, seconds: float) -> str:
    with limit.block():
        await asyncio.sleep(seconds)
        return "in time"


async def test_only_blocks_that_take_too_long_end() -> None:
    limit = TimeLimit(0.1)
    calls = [wait(limit, seconds) for seconds in (0.0, 30.0, 0.02, 30.0, 0.0)]
    ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    assert [end if isinstance(end, str) else type(end) for end in ends] == [
        "in time",
        TimeoutError,
        "in time",
        TimeoutError,
        "in time",
    ]
    assert not limit._blocks


async def test_a_later_block_has_the_whole_time_and_then_ends() -> None:
    limit, loop = TimeLimit(0.1), asyncio.get_running_loop()
    first = asyncio.ensure_future(wait(limit, 0.05))
    await asyncio.sleep(0.05)
    start = loop.time()
    with pytest.raises(TimeoutError):
        await wait(limit, 30)
    assert loop.time() - start >= 0.1
    assert await first == "in time"


async def test_thousands_of_blocks_have_one_timer_and_are_forgotten() -> None:
    limit = TimeLimit(60)
    for _ in range(3):
        await asyncio.gather(*(wait(limit, 0) for _ in range(1000)))
        assert not limit._blocks
    assert limit._timer is not None
    limit._timer.cancel()


async def test_a_cancellation_stays_one() -> None:
    limit = TimeLimit(60)
    task = asyncio.ensure_future(wait(limit, 30))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not limit._blocks


async def test_a_cancellation_at_the_moment_of_the_limit_stays_one() -> None:
    limit = TimeLimit(60)
    task = asyncio.ensure_future(wait(limit, 30))
    await asyncio.sleep(0)
    limit._blocks[0].expire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_task_goes_on_after_a_limit() -> None:
    limit = TimeLimit(0.01)

    async def twice() -> str:
        with pytest.raises(TimeoutError):
            await wait(limit, 30)
        async with asyncio.timeout(10):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return "went on"

    assert await asyncio.ensure_future(twice()) == "went on"


async def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), TimeLimit(60).block():
        raise KeyError
