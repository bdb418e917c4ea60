"""The status service: its stage, the purge of old bodies, and the note of topic ids."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from sqlalchemy import Engine

from services.common.config import Settings, refused
from services.common.database.engine import make_engine, url_of
from services.common.stage.service import StageService
from services.status.purge import purge_forever
from services.status.stage import StatusHandler, stage
from services.status.topic_ids import note_topic_ids

__all__ = ["StatusService", "build"]


class StatusService(StageService):
    """The status stage, and beside it the purge of old bodies and the note of topic ids."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._engine = engine
        self._settings = settings
        self._status = StatusHandler(engine)
        super().__init__(stage(self._status), settings)

    def background(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return the purge and the note of topic ids."""
        return (
            purge_forever(self._engine, self._settings.body_retention),
            note_topic_ids(self._engine, self._settings),
        )

    async def close(self) -> None:
        """Wait for the fold that still runs, and close the connections."""
        await self._status.close()
        self._engine.dispose()

    def problems(self) -> list[str]:
        """Return why the service is not ready. Safe from any thread."""
        return [*self._status.problems(), *super().problems()]


async def build(settings: Settings) -> StatusService:
    """Return the service, which connects when it runs. Raises ValueError for an unusable database URL."""
    with refused("database_url"):
        url = url_of(settings.database_url.get_secret_value())
    # One connection folds, the other one serves the background work.
    return StatusService(settings, make_engine(url, pool_size=2))
