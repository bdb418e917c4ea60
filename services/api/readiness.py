"""Whether the database answers: asked every half second, told to the gRPC health service."""

from __future__ import annotations

import asyncio
import time

import structlog
from grpc_health.v1 import health, health_pb2
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.common.database.errors import error_text
from services.common.database.transactions import transaction

__all__ = ["Readiness"]

log = structlog.get_logger(__name__)

_EVERY = 0.5
_SILENT_TOO_LONG = 3.0


class Readiness:
    """Asks the database and keeps grpc.health.v1's answers in step with what it says."""

    def __init__(
        self, engine: Engine, servicer: health.aio.HealthServicer, services: tuple[str, ...]
    ) -> None:
        self._engine, self._servicer, self._services = engine, servicer, services
        self._answered = -_SILENT_TOO_LONG

    def problems(self) -> list[str]:
        """Return why there is no serving now, empty where there is. May be called on any thread."""
        silent = time.monotonic() - self._answered
        return ["the database does not answer"] if silent > _SILENT_TOO_LONG else []

    async def run(self) -> None:
        """Ask and tell until cancelled."""
        asking = asyncio.create_task(self._ask())
        try:
            while True:
                await self._tell()
                await asyncio.sleep(_EVERY)
        finally:
            asking.cancel()

    async def _tell(self) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in self._services:
            await self._servicer.set(name, status.NOT_SERVING if self.problems() else status.SERVING)

    async def _ask(self) -> None:
        # A question to a database that hangs takes as long as the driver's patience; telling goes on.
        while True:
            try:
                await asyncio.to_thread(transaction, self._engine, _ping)
            except SQLAlchemyError as error:
                log.warning("the database does not answer", error=error_text(error))
            except Exception:
                log.exception("the database could not be asked")
            else:
                back = bool(self.problems())
                self._answered = time.monotonic()
                if back:
                    await self._tell()
            await asyncio.sleep(_EVERY)


def _ping(connection: Connection) -> None:
    connection.exec_driver_sql("SELECT 1")
