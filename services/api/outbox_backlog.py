"""Counts the events that are due in the outbox, for the metrics and for /readyz."""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy import Engine

from services.api.metrics import OUTBOX_DUE, OUTBOX_OLDEST_SECONDS
from services.common.database.errors import is_transient
from services.common.database.transactions import transaction
from services.common.health import Degraded
from services.common.unpublished import Unpublished, unpublished

__all__ = ["OutboxBacklog"]

log = structlog.get_logger(__name__)

_INTERVAL = 5.0
_MAX_AGE = 60.0


class OutboxBacklog:
    """Keeps the number and the age of the outbox's due events. All replicas share one outbox."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unpublished = Unpublished(0, 0.0)

    def problems(self) -> list[str]:
        """Return one Degraded problem once an event is overdue by a minute. Safe from any thread."""
        due, oldest = self._unpublished
        if oldest < _MAX_AGE:
            return []
        return [Degraded(f"{due} events in the outbox are due and not published, since {oldest:.0f} s")]

    async def run(self) -> None:
        """Count every 5 s until cancelled. While the database is away the last counts stay."""
        while True:
            try:
                self._unpublished = await asyncio.to_thread(transaction, self._engine, unpublished)
            except Exception as error:
                if not is_transient(error):
                    log.exception("the outbox could not be counted")
            OUTBOX_DUE.set(self._unpublished.due)
            OUTBOX_OLDEST_SECONDS.set(self._unpublished.oldest_seconds)
            await asyncio.sleep(_INTERVAL)
