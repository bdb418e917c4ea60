"""Starts and ends the processes of a stack, several at a time."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NoReturn

from deploy.local import process
from deploy.local.component import Component
from deploy.local.environment import without_settings
from deploy.local.layout import ROOT, Layout

__all__ = ["Launcher", "StackError"]


class StackError(Exception):
    """The stack cannot do what the command asks. The text is for the person at the terminal."""


class Launcher:
    """Starts and ends processes under `layout`. All methods block.

    `component` returns how to run the process of a name, or raises StackError. A failed start ends the waits
    for the other processes, which may need this one.
    """

    def __init__(self, layout: Layout, component: Callable[[str], Component]) -> None:
        self._layout, self._component = layout, component
        self._failure = ""

    def start(self, name: str) -> None:
        """Start `name` unless it runs. Returns when it is ready; raises StackError when that fails."""
        component = self._component(name)
        if process.find(self._layout, name) is None:
            component.prepare()
            env = {**without_settings(os.environ), "PYTHONUNBUFFERED": "1", **component.env}
            process.spawn(self._layout, name, component.argv, env, cwd=ROOT)
        deadline = time.monotonic() + component.start_timeout
        pause = 0.02
        while not component.is_ready():
            if process.find(self._layout, name) is None:
                self._give_up(f"{name} ended while it started", name)
            if time.monotonic() > deadline:
                self._give_up(f"{name} is not ready after {component.start_timeout:.0f} s", name)
            if self._failure:
                raise StackError(self._failure)
            time.sleep(pause)
            pause = min(pause * 1.3, 0.2)

    def start_all(self, names: Iterable[str]) -> None:
        """Start all of these at once, as `start` does."""
        with ThreadPoolExecutor() as pool:
            self.results([pool.submit(self.start, name) for name in names])

    def end_all(self, names: Iterable[str], most: float = math.inf) -> None:
        """End all of these at once, each by SIGTERM, and by SIGKILL after its grace, or `most` seconds."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: process.end(self._layout, name, min(self._grace(name), most)), names))

    def results(self, futures: Collection[Future[None]]) -> None:
        """Wait for all of them, and raise what a failed one raised. An interruption ends the other waits."""
        try:
            for future in wait(futures).done:
                future.result()
        except BaseException:
            self._failure = self._failure or "interrupted"
            raise

    def _give_up(self, text: str, name: str) -> NoReturn:
        self._failure = self._failure or f"{text}:\n{process.log_tail(self._layout, name)}"
        raise StackError(self._failure)

    def _grace(self, name: str) -> float:
        try:
            return self._component(name).grace
        except StackError:
            return 30
