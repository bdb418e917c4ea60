"""Threads that run calls without a future for each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["WorkerThreads"]


class WorkerThreads:
    """Runs calls in their order, on up to `count` threads. Use it from one thread.

    A ThreadPoolExecutor makes a future for each call, with locks and wake-ups of its own. A call
    here reports its result by itself, and must not raise: that would end its thread. The threads do not
    keep a process from ending.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: SimpleQueue[tuple[Callable[..., object], tuple[object, ...]] | None] = SimpleQueue()
        self._started = 0
        self._is_shut_down = False

    def submit(self, call: Callable[..., object], /, *arguments: object) -> None:
        """Run `call(*arguments)` on a thread. Does not block; raises RuntimeError after a shutdown."""
        if self._is_shut_down:
            raise RuntimeError("no new calls after shutdown")
        if self._started < self._count:
            self._started += 1
            name = f"{self._name}_{self._started}"
            threading.Thread(target=self._run, name=name, daemon=True).start()
        self._calls.put((call, arguments))

    def shutdown(self) -> None:
        """Take no more calls, and end each thread after those that were submitted. Does not block."""
        self._is_shut_down = True
        for _ in range(self._started):
            self._calls.put(None)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            call, arguments = entry
            call(*arguments)
            # While the thread waits it must not keep the last call's items alive.
            del entry, call, arguments
