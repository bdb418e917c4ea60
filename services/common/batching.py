"""Many awaits, one call: what waits while a call runs makes the next call.

There is no timed wait. An item that meets an idle Batcher goes out at the end of the loop's present
turn, together with what the same turn brings; under load the calls grow by themselves to what
arrived during the one before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")


class _Ticket(Generic[T, R]):
    """One waiter: a future, and the results of its items as they come."""

    __slots__ = ("future", "left", "results")

    def __init__(self, future: asyncio.Future[list[R | BaseException]], count: int) -> None:
        self.future = future
        self.left = count
        self.results: list[R | BaseException | None] = [None] * count


class Batcher(Generic[T, R]):
    """Turns awaits of single items into calls with many, on worker threads.

    `call` gets 1 to `limit` items, in the order of their awaits, and answers one result or exception
    for each. It runs on a worker thread and may block. What it raises must have left nothing behind
    (a transaction rolled back): unless `shared(error)` says that no single item is to blame (a lost
    connection), the batch is called again in halves, so that a poisonous item fails alone.

    `weigh` and `weight_limit` bound a call by a sum as well (bytes, say); an item above the bound goes
    alone. `concurrency` calls may run at once. `executor` is used where given, else threads of its own.

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
        self._executor = executor or ThreadPoolExecutor(concurrency, thread_name_prefix=name)
        self._own_executor = executor is None
        self._queue: deque[tuple[T, _Ticket[T, R], int]] = deque()
        self._pending = 0
        self._woken = False
        self._closed = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def pending(self) -> int:
        """Items that wait or are in a call."""
        return self._pending

    async def __call__(self, item: T) -> R:
        """Return the item's result, or raise its error. Cancelled while it waits, it is not called at all."""
        result = (await self._enqueue((item,)))[0]
        if isinstance(result, BaseException):
            raise result
        return result

    async def many(self, items: Sequence[T]) -> list[R | BaseException]:
        """Return what became of each item, errors in their places, once all are settled.

        The items may be spread over several calls, in their order.
        """
        return await self._enqueue(items) if items else []

    async def close(self) -> None:
        """Refuse what comes from now on, and return once all that waited is settled."""
        self._closed = True
        if self._pending:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)
        if self._own_executor:
            self._executor.shutdown(wait=False)

    def _enqueue(self, items: Sequence[T]) -> asyncio.Future[list[R | BaseException]]:
        if self._closed:
            raise RuntimeError("the batcher is closed")
        loop = asyncio.get_running_loop()
        ticket: _Ticket[T, R] = _Ticket(loop.create_future(), len(items))
        self._queue.extend((item, ticket, place) for place, item in enumerate(items))
        self._pending += len(items)
        self._wake(loop)
        return ticket.future

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._woken and self._idle and self._queue:
            self._woken = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._woken = False
        while self._idle and (batch := self._take()):
            self._idle -= 1
            try:
                self._executor.submit(self._work, batch, loop)
            except RuntimeError as error:  # the executor was shut down
                self._settle(batch, [error] * len(batch), loop)

    def _take(self) -> list[tuple[T, _Ticket[T, R], int]]:
        batch: list[tuple[T, _Ticket[T, R], int]] = []
        weight = 0
        while self._queue and len(batch) < self._limit:
            entry = self._queue[0]
            if entry[1].future.done():  # its waiter was cancelled
                self._queue.popleft()
                self._count_off(1)
                continue
            if self._weigh is not None:
                weight += self._weigh(entry[0])
                if batch and weight > self._weight_limit:
                    break
            batch.append(self._queue.popleft())
        return batch

    def _work(self, batch: list[tuple[T, _Ticket[T, R], int]], loop: asyncio.AbstractEventLoop) -> None:
        results = self._results([entry[0] for entry in batch])
        loop.call_soon_threadsafe(self._settle, batch, results, loop)

    def _results(self, items: list[T]) -> Sequence[R | BaseException]:
        try:
            results = self._call(items)
        except BaseException as error:
            # SystemExit and the like are the process's, never one item's.
            if len(items) == 1 or not isinstance(error, Exception) or self._shared(error):
                return [error] * len(items)
            middle = len(items) // 2
            return [*self._results(items[:middle]), *self._results(items[middle:])]
        if len(results) != len(items):
            return [RuntimeError(f"{len(items)} items called, {len(results)} results")] * len(items)
        return results

    def _settle(
        self,
        batch: list[tuple[T, _Ticket[T, R], int]],
        results: Sequence[R | BaseException],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._idle += 1
        for (_, ticket, place), result in zip(batch, results, strict=True):
            ticket.results[place] = result
            ticket.left -= 1
            if not ticket.left and not ticket.future.done():
                ticket.future.set_result(ticket.results)  # type: ignore[arg-type]
        self._count_off(len(batch))
        self._wake(loop)

    def _count_off(self, count: int) -> None:
        self._pending -= count
        if not self._pending and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
