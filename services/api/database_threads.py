"""Runs transactions on worker threads, so that a slow one delays no other RPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from services.api.abandonable import Abandonable, Abandoned
from services.api.errors import DATABASE_TIMEOUT, StatusError, database_unavailable, overloaded
from services.common.database.errors import error_text, is_transient
from services.common.database.transactions import transaction

__all__ = ["THREADS", "DatabaseThreads"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

THREADS = 4
_MAX_WAITING = 200


class DatabaseThreads:
    """Runs up to 4 transactions at a time. At most 200 wait or run. Belongs to one event loop.

    `killing` is the engine whose session ends abandoned queries, if not `engine`: the queries may use all
    sessions of that one.
    """

    def __init__(self, engine: Engine, killing: Engine | None = None) -> None:
        self._engine, self._killing = engine, killing or engine
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        self._killers = ThreadPoolExecutor(1, thread_name_prefix="kill")
        self._waiting = 0

    async def run(self, work: Callable[[Connection], R]) -> R:
        """Return what `work` returns. `transaction` may run it several times.

        Raises StatusError: RESOURCE_EXHAUSTED where 200 wait; UNAVAILABLE where the database does not answer
        within 4.5 s. The transaction may then still commit.
        """
        return await self._answer(self._start(work))

    async def read(self, work: Callable[[Connection], R]) -> R:
        """Return what `work` returns, which only reads. Raises as `run` does.

        A query whose caller leaves, or has waited for 4.5 s, is ended in the database.
        """
        query = Abandonable(work)
        future = self._start(query)
        future.add_done_callback(lambda _: query.note_over())
        try:
            return await self._answer(future)
        finally:
            if not future.done():
                query.abandon()
                self._killers.submit(query.kill, self._killing)

    def _start(self, work: Callable[[Connection], R]) -> asyncio.Future[R]:
        if self._waiting >= _MAX_WAITING:
            raise overloaded()
        self._waiting += 1
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, transaction, self._engine, work)
        future.add_done_callback(self._done)
        return future

    async def _answer(self, future: asyncio.Future[R]) -> R:
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
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, Abandoned | StatusError):
            log.warning("query failed", error=error_text(error))

    def close(self) -> None:
        """Start no more transactions. Does not wait for those that run."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._killers.shutdown(wait=False, cancel_futures=True)
