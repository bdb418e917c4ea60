"""Queries on worker threads, so that one that takes long keeps no other RPC from its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.api.errors import PATIENCE, overloaded, unavailable
from services.common.database.errors import error_text, is_transient
from services.common.database.transactions import transaction

__all__ = ["THREADS", "Reader"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

THREADS = 4
_MOST_WAITING = 200


class Reader:
    """Runs up to THREADS queries at a time; 200 wait at most."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
        self._waiting = 0

    async def read(self, query: Callable[[Connection], R]) -> R:
        """Return the query's answer.

        Raises Problem: RESOURCE_EXHAUSTED where too many wait, UNAVAILABLE where the database does not
        answer.
        """
        if self._waiting >= _MOST_WAITING:
            raise overloaded()
        loop = asyncio.get_running_loop()
        self._waiting += 1
        work = loop.run_in_executor(self._executor, transaction, self._engine, query)
        work.add_done_callback(self._done)
        try:
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(work)
        except TimeoutError:
            raise unavailable() from None
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise
            raise unavailable() from None

    def _done(self, work: asyncio.Future[R]) -> None:
        self._waiting -= 1
        if not work.cancelled() and (error := work.exception()) is not None:
            log.warning("query failed", error=error_text(error))

    def close(self) -> None:
        """Take no more queries."""
        self._executor.shutdown(wait=False, cancel_futures=True)
