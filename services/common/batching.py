"""Batching: items that arrive while a call runs make the next call.

There is no timed wait. An idle Batcher calls at the end of the loop's present turn, with all items of that
turn. Under load the calls grow by themselves, each to the items that arrived during the one before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from services.common.worker_threads import WorkerThreads

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")


class _Caller(Generic[T, R]):
    """One await: its future, its items, how many of them a call has taken, and the results so far."""

    __slots__ = ("future", "items", "left", "results", "taken")

    def __init__(self, future: asyncio.Future[list[R | BaseException]], items: Sequence[T]) -> None:
        self.future = future
        self.items = items
        self.taken = 0
        self.left = len(items)
        self.results: list[R | BaseException | None] = [None] * len(items)


class _Share(NamedTuple, Generic[T, R]):
    """The items of one caller in a call: `items[start:stop]`."""

    caller: _Caller[T, R]
    start: int
    stop: int


class Batcher(Generic[T, R]):
    """Turns awaits of single items into calls with many items, on worker threads.

    `call` gets 1 to `limit` items, in the order of their awaits, and returns one result or exception for
    each. It runs on a worker thread and may block. If it raises, it must have changed nothing (a
    transaction rolled back). The Batcher then repeats the call in halves, so that a faulty item fails
    alone. It does not if `shared(error)` is true: no single item is at fault (a lost connection).

    `weigh` and `weight_limit` also bound a call's sum of weights (bytes, for example); an item above the
    bound has a call of its own. At most `concurrency` calls run at once. They run on `executor` if given,
    else on threads of the Batcher's own.

    Belongs to one event loop. Not thread-safe.
    """

    def __init__(
        self,
        call: Callable[[Sequence[T]], Sequence[R | BaseException]],
        limit: int = 500,
        *,
        shared: Callable[[BaseException], bool] = lambda error: False,
        weigh: Callable[[T], int] | None = None,
        weight_limit: int = 0,
        concurrency: int = 1,
        executor: Executor | None = None,
        name: str = "batcher",
    ) -> None:
        if limit < 1 or concurrency < 1:
            raise ValueError("limit and concurrency are at least 1")
        self._call = call
        self._limit = limit
        self._shared = shared
        self._weigh = weigh
        self._weight_limit = weight_limit
        self._idle = concurrency
        self._own_threads = WorkerThreads(concurrency, name) if executor is None else None
        self._submit: Callable[..., object] = (self._own_threads or executor).submit  # type: ignore[union-attr]
        self._queue: deque[_Caller[T, R]] = deque()
        self._pending = 0
        self._woken = False
        self._closed = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait or are in a call."""
        return self._pending

    async def one(self, item: T) -> R:
        """Return the item's result, or raise its error. An item that is cancelled while it waits is not
        called."""
        result = (await self._enqueue((item,)))[0]
        if isinstance(result, BaseException):
            raise result
        return result

    async def many(self, items: Sequence[T]) -> list[R | BaseException]:
        """Return the result or the error of each item, in order, once all have one.

        Several calls may share the items, in their order.
        """
        return await self._enqueue(items) if items else []

    async def close(self) -> None:
        """Refuse new items, and wait until all earlier ones have their results."""
        self._closed = True
        if self._pending:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        if self._own_threads is not None:
            self._own_threads.shutdown()

    def _enqueue(self, items: Sequence[T]) -> asyncio.Future[list[R | BaseException]]:
        if self._closed:
            raise RuntimeError("the batcher is closed")
        loop = asyncio.get_running_loop()
        caller: _Caller[T, R] = _Caller(loop.create_future(), items)
        self._queue.append(caller)
        self._pending += len(items)
        self._wake(loop)
        return caller.future

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._woken and self._idle and self._queue:
            self._woken = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._woken = False
        while self._idle:
            items, shares = self._take()
            if not items:
                return
            self._idle -= 1
            try:
                self._submit(self._work, items, shares, loop)
            except RuntimeError as error:  # the executor was shut down
                self._settle(shares, [error] * len(items), loop)

    def _take(self) -> tuple[list[T], list[_Share[T, R]]]:
        """Return the items of the next call, and whose they are."""
        items: list[T] = []
        shares: list[_Share[T, R]] = []
        weight = 0
        while self._queue and len(items) < self._limit:
            caller = self._queue[0]
            if caller.future.done():  # it was cancelled
                self._queue.popleft()
                self._count_off(len(caller.items) - caller.taken)
                continue
            start = stop = caller.taken
            last = min(len(caller.items), start + self._limit - len(items))
            if self._weigh is None:
                stop = last
            while stop < last:
                weight += self._weigh(caller.items[stop])  # type: ignore[misc]
                if weight > self._weight_limit and (items or stop > start):
                    break
                stop += 1
            if stop == start:
                break
            items += caller.items[start:stop]
            shares.append(_Share(caller, start, stop))
            caller.taken = stop
            if stop == len(caller.items):
                self._queue.popleft()
            elif stop < last:
                break
        return items, shares

    def _work(self, items: list[T], shares: list[_Share[T, R]], loop: asyncio.AbstractEventLoop) -> None:
        results = self._results(items)
        # After the loop has ended nobody waits for the results.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._settle, shares, results, loop)

    def _results(self, items: list[T]) -> Sequence[R | BaseException]:
        try:
            results = self._call(items)
        except BaseException as error:
            # SystemExit and the like concern the process, never one item.
            if len(items) == 1 or not isinstance(error, Exception) or self._shared(error):
                return [error] * len(items)
            middle = len(items) // 2
            return [*self._results(items[:middle]), *self._results(items[middle:])]
        if len(results) != len(items):
            return [RuntimeError(f"{len(items)} items called, {len(results)} results")] * len(items)
        return results

    def _settle(
        self,
        shares: list[_Share[T, R]],
        results: Sequence[R | BaseException],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._idle += 1
        settled = 0
        for caller, start, stop in shares:
            end = settled + stop - start
            caller.results[start:stop] = results[settled:end]
            caller.left -= stop - start
            settled = end
            if not caller.left and not caller.future.done():
                caller.future.set_result(caller.results)  # type: ignore[arg-type]
        self._count_off(settled)
        self._wake(loop)

    def _count_off(self, count: int) -> None:
        self._pending -= count
        if not self._pending and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
