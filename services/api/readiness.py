"""Asks the database every half second whether it answers, and updates the gRPC health service."""

from __future__ import annotations

import asyncio
import time

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.api.health import HealthServicer
from services.common.database.errors import error_text
from services.common.database.transactions import transaction

__all__ = ["Readiness"]

log = structlog.get_logger(__name__)

_INTERVAL = 0.5
_MAX_SILENCE = 3.0


class Readiness:
    """Reports the api as serving at grpc.health.v1 while the database answers."""

    def __init__(self, engine: Engine, servicer: HealthServicer) -> None:
        self._engine, self._servicer = engine, servicer
        self._answered_at = -_MAX_SILENCE

    def problems(self) -> list[str]:
        """Return why the api cannot serve now; empty where it can. Safe from any thread."""
        silence = time.monotonic() - self._answered_at
        return ["the database does not answer"] if silence > _MAX_SILENCE else []

    async def run(self) -> None:
        """Ask the database and update the health service until cancelled."""
        asking = asyncio.create_task(self._ask())
        try:
            while True:
                self._update()
                await asyncio.sleep(_INTERVAL)
        finally:
            asking.cancel()

    def _update(self) -> None:
        self._servicer.set(not self.problems())

    async def _ask(self) -> None:
        # Separate from the updates: a database that hangs blocks this task until the driver's timeout.
        while True:
            try:
                await asyncio.to_thread(transaction, self._engine, _ping)
            except SQLAlchemyError as error:
                log.warning("the database does not answer", error=error_text(error))
            except Exception:
                log.exception("the database could not be asked")
            else:
                recovered = bool(self.problems())
                self._answered_at = time.monotonic()
                if recovered:
                    self._update()
            await asyncio.sleep(_INTERVAL)


def _ping(connection: Connection) -> None:
    connection.exec_driver_sql("SELECT 1")
