"""What a service does periodically: an unforeseen error is logged with its traceback, and ends nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.api import readiness
from services.api.health import HealthServicer
from services.api.readiness import Readiness
from services.status import purge

ERROR = ("error", True)


class Third:
    """A blocking call that fails twice; `came` is set by the third one."""

    def __init__(self) -> None:
        self.calls = 0
        self.came = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        if self.calls <= 2:
            raise RuntimeError("unforeseen")
        self._loop.call_soon_threadsafe(self.came.set)
        return 0


async def test_bodies_are_purged_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    third, engine = Third(), Any
    monkeypatch.setattr(purge, "_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(purge, "purge", third)
    with capture_logs() as logs:
        purging = asyncio.create_task(purge.purge_forever(engine, 60))  # type: ignore[arg-type]
        await asyncio.wait_for(third.came.wait(), 30)
        purging.cancel()
    assert [(log["log_level"], log["exc_info"]) for log in logs] == [ERROR] * 2


async def test_the_api_asks_the_database_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    third, nothing = Third(), Any
    monkeypatch.setattr(readiness, "_INTERVAL", 0.001)
    monkeypatch.setattr(readiness, "transaction", third)
    ready = Readiness(nothing, HealthServicer())  # type: ignore[arg-type]
    with capture_logs() as logs:
        running = asyncio.create_task(ready.run())
        await asyncio.wait_for(third.came.wait(), 30)
        running.cancel()
    assert [(log["log_level"], log["exc_info"]) for log in logs] == [ERROR] * 2
