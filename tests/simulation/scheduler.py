"""Virtual time: every loop, every thread and every server of a simulated system take turns, one at a time.

What happens next is decided by a heap of (time, sequence number) alone, and every latency is drawn from one
seeded generator, so that a schedule is a function of its plan. The loops run the services' coroutines; the
services' threads (the poller's) are real threads of which one runs at a time, handed the turn like a baton.

A process may die between any two turns: nothing of it runs from then on, not even a `finally`. It may be
frozen: what was to happen in it happens when it wakes. What it has sent is on its way in either case.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.threads import Thread

__all__ = ["EPOCH", "Scheduler", "here"]

EPOCH = 1_800_000_000
"""The Unix time at which every schedule begins."""


def here() -> Scheduler:
    """Return the scheduler whose turn it is."""
    return Scheduler.current


class Scheduler:
    """The heap, the clock and the baton. One at a time, on one thread."""

    current: Scheduler

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.processes: list[Process] = []
        self.actor: Process | None = None
        """The process that asked for the call which is being served."""
        self.asked = 0.0
        """When it asked."""
        self.running: Thread | None = None
        self._heap: list[tuple[float, int, Process | None, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0
        self.steps = 0
        Scheduler.current = self

    def after(self, delay: float, process: Process | None, call: Callable[..., Any], *args: Any) -> None:
        """Have `call(*args)` happen in `delay` seconds: inside `process`, or outside all of them (None)."""
        self._count += 1
        heappush(self._heap, (self.now + delay, self._count, process, call, args))

    def latency(self, most: float = 0.004) -> float:
        """Return a latency up to `most` seconds, once in a while a much longer one."""
        draw = self.rng.random()
        return draw * most if draw < 0.97 else most * (1 + 100 * (draw - 0.97))

    def run(self, until: float) -> bool:
        """Let everything happen that is due by `until`. False where nothing is left to happen."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, number, process, call, args = heappop(heap)
            if process is not None:
                if process.dead:
                    continue
                if process.frozen_until > at:
                    heappush(heap, (process.frozen_until, number, process, call, args))
                    continue
            self.now = at
            self.steps += 1
            call(*args)
        self.now = until
        return bool(heap)

    def next_at(self) -> float | None:
        """Return when the next thing happens."""
        return self._heap[0][0] if self._heap else None

    def call(
        self, process: Process, call: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Make a blocking call of `process` to a server outside: it takes effect once, whether or not the
        process lives to hear of it. `done(result, error)` happens in the process."""
        asked = self.now
        self.after(self.latency(), None, self._serve, process, asked, call, done)

    def _serve(
        self,
        process: Process,
        asked: float,
        call: Callable[[], Any],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        self.actor, self.asked = process, asked
        result, error = None, None
        try:
            result = call()
        except Exception as problem:
            error = problem
        finally:
            self.actor = None
        self.after(self.latency(), process, done, result, error)

    def dispose(self) -> None:
        """Take down all that is left, without letting it do anything more."""
        self._heap.clear()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.loop.dispose()
