"""The status service: its stage, running, and beside it the purge of old bodies and a note of topic ids."""

from __future__ import annotations

import asyncio

from sqlalchemy import Engine

from services.common.config import Settings, refused
from services.common.database.engine import make_engine, url_of
from services.common.stage.runtime import StageRuntime
from services.status.purge import purge_forever
from services.status.stage import Status, stage
from services.status.topic_ids import note_topic_ids

__all__ = ["StatusService", "build"]


class StatusService:
    """What services/common/process.py runs."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._engine = engine
        self._settings = settings
        self._status = Status(engine)
        self._runtime = StageRuntime(stage(self._status), settings, source="status")

    async def run(self) -> None:
        """Fold until stopped and drained. Raises what ended the stage otherwise."""
        beside = [
            asyncio.create_task(purge_forever(self._engine, self._settings.body_retention)),
            asyncio.create_task(note_topic_ids(self._engine, self._settings)),
        ]
        try:
            await self._runtime.run()
        finally:
            for task in beside:
                task.cancel()
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
    # One connection folds, one is for what runs beside it.
    return StatusService(settings, make_engine(url, pool_size=2))
