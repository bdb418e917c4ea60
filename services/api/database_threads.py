"""Runs transactions on worker threads, so that a slow one delays no other RPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.api.errors import DATABASE_TIMEOUT, database_unavailable, overloaded
from services.common.database.errors import error_text, is_transient
from services.common.database.transactions import transaction

__all__ = ["THREADS", "DatabaseThreads"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

THREADS = 4
_MAX_WAITING = 200


class DatabaseThreads:
    """Runs up to 4 transactions at a time. At most 200 wait or run. Belongs to one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        self._waiting = 0

    async def run(self, work: Callable[[Connection], R]) -> R:
        """Return what `work` returns. `transaction` may run it several times.

        Raises StatusError: RESOURCE_EXHAUSTED where 200 wait; UNAVAILABLE where the database does not answer
        within 4.5 s. The transaction may then still commit.
        """
        if self._waiting >= _MAX_WAITING:
            raise overloaded()
        loop = asyncio.get_running_loop()
        self._waiting += 1
        future = loop.run_in_executor(self._executor, transaction, self._engine, work)
        future.add_done_callback(self._done)
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT):
                return await asyncio.shield(future)
        except TimeoutError:
            raise database_unavailable() from None
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise
            raise database_unavailable() from None

    def _done(self, future: asyncio.Future[R]) -> None:
        self._waiting -= 1
        if not future.cancelled() and (error := future.exception()) is not None:
            log.warning("query failed", error=error_text(error))

    def close(self) -> None:
        """Start no more transactions. Does not wait for those that run."""
        self._executor.shutdown(wait=False, cancel_futures=True)
