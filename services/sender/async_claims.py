"""The claims for coroutines: one call for all that is asked in a moment, and patience with the database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from services.common.batching import Batcher
from services.common.database import transient
from services.sender.decide import Cancel, Claim, Delivery, Settlement, Verdict

__all__ = ["AsyncClaims", "BlockingClaims"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_LIMIT = 500


def _database_is_at_fault(error: BaseException) -> bool:
    """Whether to wait. Also for a refused login, a missing table and the like: an operator mends those, and
    until then no task may become a dead letter for them. Only a value that does not fit is the task's own."""
    if isinstance(error, DataError | IntegrityError):
        return False
    return isinstance(error, DBAPIError) or transient(error)


class BlockingClaims(Protocol):
    """What is made asynchronous here; `Claims` says what each does."""

    def claim(self, requests: Sequence[Claim | Cancel]) -> list[Verdict]: ...

    def settle(self, settled: Sequence[Delivery]) -> list[Settlement]: ...

    def renew(self, rows: Sequence[Delivery]) -> list[bool]: ...


class AsyncClaims:
    """`Claims` for the handlers. `claim` and `settle` wait as long as the database is away; a caller that has
    had enough is cancelled. A cancelled call may still be made. Belongs to one event loop."""

    def __init__(self, claims: BlockingClaims) -> None:
        shared = _database_is_at_fault
        self._claims = claims
        self._claim: Batcher[Claim | Cancel, Verdict] = Batcher(
            claims.claim, _LIMIT, shared=shared, name="claims"
        )
        self._settle: Batcher[Delivery, Settlement] = Batcher(
            claims.settle, _LIMIT, shared=shared, name="settles"
        )
        self._renewals = ThreadPoolExecutor(1, thread_name_prefix="renewals")
        self.trouble: str | None = None
        """What the database last said, while it is of no use."""

    async def claim(self, request: Claim | Cancel) -> Verdict:
        """Answer one request. Requests are made in the order in which they were asked for."""
        return await self._patiently(self._claim, request)

    async def settle(self, settled: Delivery) -> Settlement:
        """Write one outcome; return what became of it."""
        return await self._patiently(self._settle, settled)

    async def renew(self, rows: Sequence[Delivery]) -> Sequence[bool]:
        """Renew once, at once; raises `sqlalchemy.exc.DBAPIError`."""
        loop = asyncio.get_running_loop()
        try:
            held = await loop.run_in_executor(self._renewals, self._claims.renew, rows)
        except Exception as error:
            self.trouble = str(error)
            raise
        self.trouble = None
        return held

    async def close(self) -> None:
        """Return once all that was asked for is done."""
        await self._claim.close()
        await self._settle.close()
        self._renewals.shutdown(wait=False)

    async def _patiently(self, call: Callable[[T], Awaitable[R]], item: T) -> R:
        try:
            result = await call(item)
        except Exception as error:
            if not _database_is_at_fault(error):
                raise
            self._notice(error)
            result = await self._until_back(call, item)
        self.trouble = None
        return result

    async def _until_back(self, call: Callable[[T], Awaitable[R]], item: T) -> R:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_database_is_at_fault),
            wait=wait_exponential_jitter(multiplier=0.1, max=3, jitter=0.1),
            before_sleep=self._before_sleep,
            reraise=True,
        ):
            with attempt:
                result = await call(item)
        return result

    def _before_sleep(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None:
            self._notice(error)

    def _notice(self, error: BaseException) -> None:
        if self.trouble is None:
            log.warning("the database is away", error=str(error))
        self.trouble = str(error)
