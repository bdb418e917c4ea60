"""A steady load of tasks for the tests of a whole system."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.pipeline import Pipeline

__all__ = ["Load"]


class Load:
    """Careful callers that create `rate` tasks a second until `end`, which raises their errors.

    A context manager.
    """

    def __init__(self, pipeline: Pipeline, mark: str, callers: int = 4, rate: float = 20.0) -> None:
        self._pipeline, self._mark, self._pause = pipeline, mark, callers / rate
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self.ids: list[str] = []
        self._lanes = [self._pool.submit(self._run, lane) for lane in range(callers)]

    def _run(self, lane: int) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            email = f"u{lane}-{number}@d{number % 50}.ok.test"
            self.ids.append(self._pipeline.create_surely(email, f"{self._mark}-{lane}-{number}"))
            self._stop.wait(self._pause)

    def end(self) -> None:
        """Let each caller finish its task."""
        self._stop.set()
        for lane in self._lanes:
            lane.result()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        if kind is None:
            self.end()
