"""An event loop and a thread pool in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Executor as BaseExecutor
from typing import TYPE_CHECKING, Any

from tests.simulation.scheduler import here

if TYPE_CHECKING:
    from tests.simulation.process import Process

__all__ = ["Executor", "Loop"]


class _Handle:
    """A callback that is ready to run: asyncio's Handle without its debugging."""

    __slots__ = ("args", "callback", "context", "over")

    def __init__(self, callback: Any, args: tuple[Any, ...], context: Any) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.over = False

    def cancel(self) -> None:
        self.over = True

    def cancelled(self) -> bool:
        return self.over


class Loop:
    """The event loop of a process in virtual time, with the methods that the services use.

    Ready callbacks run in order, a turn at a time.
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
        # In order, as asyncio does.
        self._posted = max(self._posted, scheduler.now + scheduler.latency(0.001)) + 1e-9
        scheduler.after(self._posted - scheduler.now, self.process, self.enter, callback, *args)

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
            self.enter(_resolve, future, result, error)

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

    def enter(self, callback: Any, *args: Any) -> None:
        """Run a callback that comes from outside; at once when the loop is idle."""
        self._due(_Handle(callback, args, None))

    def _due(self, handle: _Handle) -> None:
        if not handle.over:
            self._ready.append(handle)
            if not self._turning:
                self._turning = True
                self._turn()

    def _turn(self) -> None:
        ready, random_ = self._ready, self._scheduler.rng.random
        asyncio._set_running_loop(self._as_loop)
        try:
            while True:
                for _ in range(len(ready)):
                    self._run(ready.popleft())
                # Other callbacks may come in between two turns.
                if not ready or random_() < 0.5:
                    break
        finally:
            asyncio._set_running_loop(None)
        if ready:
            self._scheduler.after(random_() * 0.0005, self.process, self._turn)
        else:
            self._turning = False

    def _run(self, handle: _Handle) -> None:
        if handle.over:
            return
        try:
            if handle.context is None:
                handle.callback(*handle.args)
            else:
                handle.context.run(handle.callback, *handle.args)
        except Exception as error:
            self.call_exception_handler({"message": "in a callback", "exception": error})

    def dispose(self) -> None:
        """Close the tasks that have not ended. The effects of their `finally` blocks are lost."""
        self._turning = True
        asyncio._set_running_loop(self._as_loop)
        try:
            for task in self._tasks:  # a `finally` block may add tasks
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
    """Replaces a ThreadPoolExecutor whose threads only wait for the database."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "") -> None:
        pass

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        here().call(loop.process, lambda: fn(*args, **kwargs), lambda result, error: None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass
