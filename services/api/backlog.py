"""What is due and not published: shown as metrics and, once it is old, as a problem."""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy import Engine

from services.api.metrics import OUTBOX_DUE, OUTBOX_OLDEST_SECONDS
from services.common.database.errors import is_transient
from services.common.database.transactions import transaction
from services.common.health import Degraded
from services.common.unpublished import Unpublished, unpublished

__all__ = ["Backlog"]

log = structlog.get_logger(__name__)

_EVERY = 5.0
_TOO_OLD = 60.0


class Backlog:
    """Keeps the outbox's figures, which are those of all replicas."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._found = Unpublished(0, 0.0)

    def problems(self) -> list[str]:
        """Return that events are not published, where the first became due long ago. Safe from any thread."""
        due, oldest = self._found
        if oldest < _TOO_OLD:
            return []
        return [Degraded(f"{due} events in the outbox are due and not published, since {oldest:.0f} s")]

    async def run(self) -> None:
        """Ask until cancelled. What was found last stands while the database is away."""
        while True:
            try:
                self._found = await asyncio.to_thread(transaction, self._engine, unpublished)
            except Exception as error:
                if not is_transient(error):
                    log.exception("the outbox could not be counted")
            OUTBOX_DUE.set(self._found.due)
            OUTBOX_OLDEST_SECONDS.set(self._found.oldest_seconds)
            await asyncio.sleep(_EVERY)
