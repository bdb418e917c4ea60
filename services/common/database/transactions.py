"""Transactions with retries: at once after a conflict, or when the database is back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
    wait_random_exponential,
)

from services.common.database.errors import is_conflict, is_session_lost, is_transient

__all__ = ["retry_until_available", "transaction"]

R = TypeVar("R")

# An error that came later than this (a lock wait, a read timeout) is raised without a retry (seconds).
RETRY_TIMEOUT = 1.0


def _at_once(error: BaseException) -> bool:
    return is_conflict(error) or is_session_lost(error)


_again = Retrying(
    retry=retry_if_exception(_at_once),
    wait=wait_random_exponential(multiplier=0.005, max=0.2),
    stop=stop_after_attempt(8) | stop_after_delay(RETRY_TIMEOUT),
    reraise=True,
)


def transaction(engine: Engine, work: Callable[[Connection], R]) -> R:
    """Run `work(connection)` in a transaction and commit it; return its result. Blocks.

    The transaction is repeated after a conflict, and if a pooled connection turns out to be lost. Since a
    connection may be lost during the commit, `work` must bear running twice. Raises
    `sqlalchemy.exc.DBAPIError`; `errors.is_transient` says whether a later retry may help.
    """

    def once() -> R:
        with engine.begin() as connection:
            return work(connection)

    started = time.monotonic()
    try:
        return once()
    except DBAPIError as error:
        if not _at_once(error) or time.monotonic() - started > RETRY_TIMEOUT:
            raise
    return _again(once)


def retry_until_available(
    noticed: Callable[[BaseException], None],
    passes: Callable[[BaseException], bool] = is_transient,
    most: float = 3.0,
) -> AsyncRetrying:
    """Return a policy that repeats calls until the database answers: `await retry_until_available(f)(call,
    ...)`.

    `noticed` gets each error for which `passes` is true; others are raised. The policy waits 0.1 s at
    first, and later up to `most` seconds.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            noticed(error)

    return AsyncRetrying(
        retry=retry_if_exception(passes),
        wait=wait_exponential_jitter(multiplier=0.1, max=most, jitter=0.1),
        before_sleep=tell,
        reraise=True,
    )
