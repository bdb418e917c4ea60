"""Batcher: the result of each await, whatever its neighbours do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.batching import Batcher


class Gate:
    """A call that blocks until the test releases it, and keeps its items."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self._let = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int | BaseException]:
        self.calls.append(list(items))
        self.entered.release()
        assert self._let.acquire(timeout=10)
        return [item * 10 for item in items]

    def let(self, calls: int = 1) -> None:
        self._let.release(calls)

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


def start(batcher: Batcher[int, int], *items: int) -> list[asyncio.Task[int]]:
    async def one(item: int) -> int:
        return await batcher.one(item)

    return [asyncio.ensure_future(one(item)) for item in items]


async def test_items_that_arrive_during_a_call_make_the_next_one() -> None:
    gate = Gate()
    batcher = Batcher(gate, limit=3)
    first = start(batcher, 1)
    await gate.wait_entered()
    rest = start(batcher, 2, 3, 4, 5)
    await asyncio.sleep(0)
    assert batcher.pending == 5
    gate.let(3)
    assert await asyncio.gather(*first, *rest) == [10, 20, 30, 40, 50]
    assert gate.calls == [[1], [2, 3, 4], [5]]
    assert batcher.pending == 0
    await batcher.close()


async def test_items_of_one_turn_of_the_loop_share_a_call() -> None:
    gate = Gate()
    gate.let()
    batcher = Batcher(gate)
    assert await asyncio.gather(*start(batcher, 1, 2, 3)) == [10, 20, 30]
    assert gate.calls == [[1, 2, 3]]


async def test_calls_run_side_by_side_up_to_the_concurrency() -> None:
    gate = Gate()
    batcher = Batcher(gate, limit=1, concurrency=2)
    tasks = start(batcher, 1, 2, 3)
    await gate.wait_entered()
    await gate.wait_entered()
    assert len(gate.calls) == 2
    gate.let(3)
    assert await asyncio.gather(*tasks) == [10, 20, 30]


async def test_each_await_gets_its_own_error() -> None:
    def call(items: Sequence[int]) -> list[int | BaseException]:
        return [KeyError(item) if item % 2 else item for item in items]

    batcher = Batcher(call)
    results = await asyncio.gather(*start(batcher, 1, 2, 3), return_exceptions=True)
    assert [repr(result) for result in results] == ["KeyError(1)", "2", "KeyError(3)"]
    assert [repr(result) for result in await batcher.many([4, 5])] == ["4", "KeyError(5)"]
    assert await batcher.many([]) == []


@settings(deadline=None, max_examples=50)
@given(poison=st.sets(st.integers(0, 40)), size=st.integers(1, 41), limit=st.integers(1, 50))
def test_a_faulty_item_fails_alone(poison: set[int], size: int, limit: int) -> None:
    def call(items: Sequence[int]) -> list[int | BaseException]:
        if bad := poison.intersection(items):
            raise ValueError(f"one of {len(items)}: {sorted(bad)}")
        return list(items)

    async def run() -> list[int | BaseException]:
        return await asyncio.gather(
            *start(Batcher(call, limit, executor=pool), *range(size)), return_exceptions=True
        )

    with ThreadPoolExecutor(1) as pool:
        results = asyncio.run(run())
    for item, result in enumerate(results):
        assert str(result) == (f"one of 1: [{item}]" if item in poison else str(item))


async def test_an_error_that_no_item_caused_is_not_retried() -> None:
    calls = []

    def call(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        raise ConnectionError("gone")

    batcher = Batcher(call, shared=lambda error: isinstance(error, ConnectionError))
    results = await asyncio.gather(*start(batcher, *range(8)), return_exceptions=True)
    assert all(isinstance(result, ConnectionError) for result in results)
    assert calls == [8]


async def test_a_call_with_too_few_results_fails_its_items() -> None:
    batcher = Batcher(lambda items: list(items)[1:])
    for result in await asyncio.gather(*start(batcher, 1, 2), return_exceptions=True):
        assert str(result) == "2 items called, 1 results"


async def test_a_cancelled_item_is_not_called_and_affects_no_other() -> None:
    gate = Gate()
    batcher = Batcher(gate)
    running, waiting = start(batcher, 1, 2), []
    await gate.wait_entered()
    waiting = start(batcher, 3, 4)
    await asyncio.sleep(0)
    running[0].cancel()
    waiting[0].cancel()
    gate.let(2)
    results = await asyncio.gather(*running, *waiting, return_exceptions=True)
    assert [type(r) if isinstance(r, BaseException) else r for r in results] == [
        asyncio.CancelledError,
        20,
        asyncio.CancelledError,
        40,
    ]
    assert gate.calls == [[1, 2], [4]]
    assert batcher.pending == 0


async def test_close_waits_for_what_is_pending_and_refuses_more() -> None:
    gate = Gate()
    batcher = Batcher(gate, limit=1)
    tasks = start(batcher, 1, 2)
    await gate.wait_entered()
    closing = asyncio.ensure_future(batcher.close())
    await asyncio.sleep(0)
    assert not closing.done()
    with pytest.raises(RuntimeError, match="closed"):
        await batcher.one(3)
    gate.let(2)
    await closing
    assert [task.result() for task in tasks] == [10, 20]
    await batcher.close()


async def test_a_call_is_bounded_by_weight_and_a_heavy_item_goes_alone() -> None:
    calls = []

    def call(items: Sequence[int]) -> list[int]:
        calls.append(list(items))
        return list(items)

    batcher = Batcher(call, weigh=lambda item: item, weight_limit=10)
    await batcher.many([4, 6, 1, 99, 1])
    assert calls == [[4, 6], [1], [99], [1]]


async def test_many_spreads_over_calls_in_order() -> None:
    gate = Gate()
    gate.let(3)
    batcher = Batcher(gate, limit=2)
    assert await batcher.many(range(5)) == [0, 10, 20, 30, 40]
    assert gate.calls == [[0, 1], [2, 3], [4]]


async def test_many_that_are_cancelled_half_way_keep_nothing_pending() -> None:
    gate = Gate()
    batcher = Batcher(gate, limit=2)
    many = asyncio.ensure_future(batcher.many(range(5)))
    await gate.wait_entered()
    many.cancel()
    rest = start(batcher, 7)
    gate.let(2)
    assert await asyncio.gather(*rest) == [70]
    assert gate.calls == [[0, 1], [7]]
    assert batcher.pending == 0


async def test_callers_share_calls_that_run_side_by_side() -> None:
    gate = Gate()
    batcher = Batcher(gate, limit=4, concurrency=2)
    many = [asyncio.ensure_future(batcher.many(range(n, n + 3))) for n in (0, 10)]
    await gate.wait_entered()
    await gate.wait_entered()
    gate.let(2)
    assert await asyncio.gather(*many) == [[0, 10, 20], [100, 110, 120]]
    assert sorted(gate.calls) == [[0, 1, 2, 10], [11, 12]]


async def test_an_executor_that_was_shut_down_fails_the_items() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    batcher = Batcher(list, executor=pool)
    with pytest.raises(RuntimeError, match="shutdown"):
        await batcher.one(1)
    assert batcher.pending == 0
