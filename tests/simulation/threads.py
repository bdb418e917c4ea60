"""Threads and clocks in virtual time, which replace the `threading` and `time` modules.

The threads are real, but one runs at a time. Each blocks in `Thread.block` until the scheduler gives it the
turn, and gives the turn back when it blocks again or ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import ClassVar

from tests.simulation.loop import Loop
from tests.simulation.scheduler import EPOCH, here

__all__ = ["Event", "Killed", "Thread", "VirtualTime"]


class Killed(BaseException):
    """Raised in a thread whose process is dead, to unwind it."""


class _Worker:
    """A real thread that runs one simulated thread after another, while it has the turn."""

    free: ClassVar[list[_Worker]] = []
    back = threading.Lock()
    back.acquire()

    def __init__(self) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.job: Callable[[], None] | None = None
        threading.Thread(target=self._run, daemon=True, name="simulated").start()

    def _run(self) -> None:
        while True:
            self.go.acquire()
            assert self.job is not None
            with contextlib.suppress(Killed):
                self.job()
            self.job = None
            self.free.append(self)
            self.back.release()


class Thread:
    """Replaces threading.Thread. Belongs to the process whose loop or thread made it."""

    def __init__(self, target: Callable[[], None], name: str = "", daemon: bool = True) -> None:
        self._scheduler = here()
        if (maker := self._scheduler.running) is not None:
            self._process = maker._process
        else:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, Loop)
            self._process = loop.process
        self._target = target
        self._worker: _Worker | None = None
        self._token = 0
        self._value = False
        self._process.threads.append(self)

    def start(self) -> None:
        """Start the thread after a latency."""
        self._scheduler.after(self._scheduler.latency(0.001), self._process, self._begin)

    def _begin(self) -> None:
        self._worker = _Worker.free.pop() if _Worker.free else _Worker()
        self._worker.job = self._work
        self._switch()

    def _work(self) -> None:
        try:
            self._target()
        finally:
            self._worker = None

    def _switch(self) -> None:
        assert self._worker is not None
        before, self._scheduler.running = self._scheduler.running, self
        self._worker.go.release()
        _Worker.back.acquire()
        self._scheduler.running = before

    def block(self, seconds: float | None) -> bool:
        """Give the turn back until notified (True) or `seconds` are over. Called on the thread itself."""
        if self._process.dead:
            raise Killed
        if seconds is not None:
            self._scheduler.after(seconds, self._process, self._resume, self._token, False)
        worker = self._worker
        assert worker is not None
        worker.back.release()
        worker.go.acquire()
        if self._process.dead:
            raise Killed
        return self._value

    def notify(self, delay: float) -> None:
        """End the present `block` in `delay` seconds."""
        self._scheduler.after(delay, self._process, self._resume, self._token, True)

    def _resume(self, token: int, value: bool) -> None:
        if token == self._token and self._worker is not None:
            self._token += 1
            self._value = value
            self._switch()

    def unwind(self) -> None:
        """End the thread of a dead process."""
        if self._worker is not None:
            self._switch()


class Event:
    """Replaces threading.Event, for one waiting thread."""

    def __init__(self) -> None:
        self._set = False
        self._waiter: Thread | None = None

    def set(self) -> None:
        """Set the event and wake the waiting thread."""
        self._set = True
        if self._waiter is not None:
            self._waiter.notify(here().latency(0.0005))
            self._waiter = None

    def clear(self) -> None:
        """Clear the event."""
        self._set = False

    def is_set(self) -> bool:
        """Return whether the event is set."""
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Block the running simulated thread until the event is set. Return whether it is."""
        if self._set:
            return True
        thread = here().running
        assert thread is not None
        self._waiter = thread
        thread.block(timeout)
        self._waiter = None
        return self._set


class VirtualTime:
    """Replaces the `time` and `threading` modules."""

    Thread, Event = Thread, Event

    @staticmethod
    def monotonic() -> float:
        """Return the seconds since the start of the schedule, plus a thousand."""
        return here().now + 1000

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        """Return the Unix time in seconds."""
        return EPOCH + here().now

    @staticmethod
    def time_ns() -> int:
        """Return the Unix time in nanoseconds."""
        return (EPOCH * 1_000_000 + int(here().now * 1e6)) * 1000

    @staticmethod
    def sleep(seconds: float) -> None:
        """Block the running simulated thread."""
        thread = here().running
        assert thread is not None
        thread.block(seconds)
