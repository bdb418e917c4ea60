"""Virtual time: the loops, threads and servers of a simulated system take turns, one at a time.

A heap of (time, sequence number) decides what happens next. Every latency comes from one seeded generator. So
a schedule is a function of its plan. The loops run the services' coroutines. The services' threads (the
poller's) are real threads, but only the one that has the turn runs.

A process may die between any two turns. Then nothing of it runs any more, not even a `finally`. A frozen
process does everything once it wakes. What a process has sent arrives in either case.
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
"""The Unix time at the start of every schedule."""


def here() -> Scheduler:
    """Return the scheduler of the present schedule."""
    return Scheduler.current


class Scheduler:
    """The heap, the clock and the turn. There is one at a time, on one thread."""

    current: Scheduler

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.processes: list[Process] = []
        self.actor: Process | None = None
        """The process whose call is being served."""
        self.asked = 0.0
        """The time of that call."""
        self.running: Thread | None = None
        self._heap: list[tuple[float, int, Process | None, Callable[..., Any], tuple[Any, ...]]] = []
        self._count = 0
        self.steps = 0
        Scheduler.current = self

    def after(self, delay: float, process: Process | None, call: Callable[..., Any], *args: Any) -> None:
        """Run `call(*args)` in `delay` seconds, inside `process` or outside all processes (None)."""
        self._count += 1
        heappush(self._heap, (self.now + delay, self._count, process, call, args))

    def latency(self, most: float = 0.004) -> float:
        """Return a latency of up to `most` seconds, at times up to four times as long."""
        draw = self.rng.random()
        return draw * most if draw < 0.97 else most * (1 + 100 * (draw - 0.97))

    def run(self, until: float) -> bool:
        """Run everything that is due by `until`. Return whether more is scheduled."""
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
        """Return the time of the next call; None when there is none."""
        return self._heap[0][0] if self._heap else None

    def call(
        self, process: Process, call: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Make a blocking call of `process` to a server.

        The call takes effect once, even if the process dies first. `done(result, error)` runs in the process.
        """
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
        """Kill all processes and drop everything that is scheduled."""
        self._heap.clear()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.loop.dispose()
