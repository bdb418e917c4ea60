"""Virtual time: every loop, every thread and every server of a simulated system take turns, one at a time.

What happens next is decided by a heap of (time, sequence number) alone, and every latency is drawn from one
seeded generator, so that a schedule is a function of its plan. The loops run the services' coroutines; the
services' threads (the poller's) are real threads of which one runs at a time, handed the turn like a baton.

A process may die between any two turns: nothing of it runs from then on, not even a `finally`. It may be
frozen: what was to happen in it happens when it wakes. What it has sent is on its way in either case.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor as BaseExecutor
from heapq import heappop, heappush
from typing import Any, ClassVar

__all__ = ["EPOCH", "Executor", "Killed", "Loop", "Process", "Scheduler", "Thread", "VirtualTime", "here"]

EPOCH = 1_800_000_000
"""The Unix time at which every schedule begins."""


class Killed(BaseException):
    """Raised in a thread whose process is dead, to unwind it."""


def here() -> Scheduler:
    """Return the scheduler whose turn it is."""
    return Scheduler.current


class Process:
    """One operating system process: a loop and threads, which live, freeze and die together."""

    def __init__(self, scheduler: Scheduler, name: str, service: str) -> None:
        self.scheduler, self.name, self.service = scheduler, name, service
        self.dead = False
        self.frozen_until = 0.0
        self.loop = Loop(self)
        self.threads: list[Thread] = []

    def kill(self) -> None:
        """End it as SIGKILL does."""
        if not self.dead:
            self.dead = True
            for thread in self.threads:
                thread.unwind()


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

    def process(self, name: str, service: str) -> Process:
        """Begin a process."""
        made = Process(self, name, service)
        self.processes.append(made)
        return made

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


# --- loops ---------------------------------------------------------------------------------------


class _Handle:
    """What is ready to run: asyncio's Handle without its debugging."""

    __slots__ = ("args", "callback", "context", "over")

    def __init__(self, callback: Any, args: tuple[Any, ...], context: Any) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.over = False

    def cancel(self) -> None:
        self.over = True

    def cancelled(self) -> bool:
        return self.over


class Loop:
    """A process's event loop in virtual time, as much of one as the services use.

    What is ready runs in its order, a turn at a time.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self._scheduler = process.scheduler
        self._as_loop: Any = self
        self._ready: deque[_Handle] = deque()
        self._turning = False
        self._posted = 0.0
        self._tasks: list[asyncio.Task[Any]] = []
        self.errors: list[str] = []

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = _Handle(callback, args, context)
        self._ready.append(handle)
        if not self._turning:
            self._turning = True
            scheduler = self._scheduler
            scheduler.after(scheduler.rng.random() * 0.0005, self.process, self._turn)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        scheduler = self._scheduler
        # In order, as asyncio's.
        self._posted = max(self._posted, scheduler.now + scheduler.latency(0.001)) + 1e-9
        scheduler.after(self._posted - scheduler.now, self.process, self.call_soon, callback, *args)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self._scheduler.now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = _Handle(callback, args, context)
        delay = max(0.0, when - self._scheduler.now)
        self._scheduler.after(delay, self.process, self._due, handle)
        return handle

    def time(self) -> float:
        return self._scheduler.now

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self._as_loop, name=name)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            self.call_soon(_resolve, future, result, error)

        self._scheduler.call(self.process, lambda: func(*args), done)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.process.dead

    def _due(self, handle: _Handle) -> None:
        if not handle.over:
            self._ready.append(handle)
            if not self._turning:
                self._turning = True
                self._turn()

    def _turn(self) -> None:
        ready = self._ready
        asyncio._set_running_loop(self._as_loop)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle.over:
                    continue
                try:
                    if handle.context is None:
                        handle.callback(*handle.args)
                    else:
                        handle.context.run(handle.callback, *handle.args)
                except Exception as error:
                    self.call_exception_handler({"message": "in a callback", "exception": error})
        finally:
            asyncio._set_running_loop(None)
        if ready:
            scheduler = self._scheduler
            scheduler.after(scheduler.rng.random() * 0.0005, self.process, self._turn)
        else:
            self._turning = False

    def dispose(self) -> None:
        """Close what never came to its end. What it does in its `finally` blocks reaches nobody."""
        self._turning = True
        asyncio._set_running_loop(self._as_loop)
        try:
            for task in self._tasks:  # grows while it runs: last words
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
                elif not task.cancelled():
                    task.exception()
        finally:
            asyncio._set_running_loop(None)
        self._tasks.clear()
        self._ready.clear()


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Executor(BaseExecutor):
    """Takes the place of a ThreadPoolExecutor whose threads only ever wait for the database."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "") -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        here().call(loop.process, lambda: fn(*args, **kwargs), lambda result, error: None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


# --- threads -------------------------------------------------------------------------------------


class _Worker:
    """A real thread that runs one simulated thread after another, while it has the baton."""

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
    """Takes the place of threading.Thread. Belongs to the process on whose loop it was made."""

    def __init__(self, target: Callable[[], None], name: str = "", daemon: bool = True) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._process = loop.process
        self._scheduler = here()
        self._target = target
        self._worker: _Worker | None = None
        self._token = 0
        self._value = False
        self._process.threads.append(self)

    def start(self) -> None:
        """Let it begin soon."""
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
        """Called on the thread itself: give the baton back until notified (True) or `seconds` are over."""
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
        """End its present `block` in `delay` seconds."""
        self._scheduler.after(delay, self._process, self._resume, self._token, True)

    def _resume(self, token: int, value: bool) -> None:
        if token == self._token and self._worker is not None:
            self._token += 1
            self._value = value
            self._switch()

    def unwind(self) -> None:
        """Let it end, its process being dead."""
        if self._worker is not None:
            self._switch()


class Event:
    """Takes the place of threading.Event, for one thread that waits."""

    def __init__(self) -> None:
        self._set = False
        self._waiter: Thread | None = None

    def set(self) -> None:
        """Set it; who waits goes on."""
        self._set = True
        if self._waiter is not None:
            self._waiter.notify(here().latency(0.0005))
            self._waiter = None

    def clear(self) -> None:
        """Take it back."""
        self._set = False

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Wait on the running simulated thread."""
        if self._set:
            return True
        thread = here().running
        assert thread is not None
        self._waiter = thread
        thread.block(timeout)
        self._waiter = None
        return self._set


class VirtualTime:
    """Takes the place of the `time` and `threading` modules."""

    Thread, Event = Thread, Event

    @staticmethod
    def monotonic() -> float:
        """Seconds since the schedule began, and a thousand."""
        return here().now + 1000

    perf_counter = monotonic

    @staticmethod
    def time() -> float:
        """The Unix time."""
        return EPOCH + here().now

    @staticmethod
    def time_ns() -> int:
        """The Unix time in nanoseconds."""
        return (EPOCH * 1_000_000 + int(here().now * 1e6)) * 1000

    @staticmethod
    def sleep(seconds: float) -> None:
        """Block the running simulated thread."""
        thread = here().running
        assert thread is not None
        thread.block(seconds)
