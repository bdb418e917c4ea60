"""The status service: its stage, running, and the purge of old bodies beside it."""

from __future__ import annotations

import asyncio

from sqlalchemy import Engine

from services.common.config import Settings, refused
from services.common.database import engine_of, url_of
from services.common.stage.runtime import StageRuntime
from services.status.purge import purge_forever
from services.status.stage import Status, stage

__all__ = ["StatusService", "build"]


class StatusService:
    """What services/common/process.py runs."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._engine = engine
        self._retention = settings.body_retention
        self._status = Status(engine)
        self._runtime = StageRuntime(stage(self._status), settings, source="status")

    async def run(self) -> None:
        """Fold until stopped and drained. Raises what ended the stage otherwise."""
        purging = asyncio.create_task(purge_forever(self._engine, self._retention))
        try:
            await self._runtime.run()
        finally:
            purging.cancel()
            await self._status.close()
            self._engine.dispose()

    def stop(self) -> None:
        """Begin to drain. Does not block."""
        self._runtime.stop()

    def problems(self) -> list[str]:
        """Return why the service is not ready. Safe from any thread."""
        return [*self._status.problems(), *self._runtime.problems()]


async def build(settings: Settings) -> StatusService:
    """Return the service; it connects to nothing before it runs.

    Raises ValueError for a database URL that cannot be used.
    """
    with refused("database_url"):
        url = url_of(settings.database_url)
    # One connection folds, one purges.
    return StatusService(settings, engine_of(url, pool_size=2))
