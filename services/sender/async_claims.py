"""The claims for coroutines: calls are batched, and repeated while the database is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import structlog

from services.common.batching import Batcher
from services.common.database.errors import error_text, is_database_fault
from services.common.database.transactions import retry_until_available
from services.common.deliveries.decide import Cancel, Claim, ClaimAnswer, Delivery
from services.common.deliveries.settlement import Settlement

__all__ = ["AsyncClaims", "BlockingClaims"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_LIMIT = 500
# After the database's first answer no claim is taken over for this long (seconds): its owner may still have
# an outcome to store or a lease to renew. Owners try every second; a connection attempt without an answer
# takes four more.
OWNERS_FIRST = 6.0
_RETRY_SECONDS = 1.0
# Waiting callers ask the database about every second. Trouble that is older than this (seconds) may be over.
_TROUBLE_TTL = 30.0


class BlockingClaims(Protocol):
    """The calls behind AsyncClaims; `Claims` says what each does."""

    def claim(self, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]: ...

    def store(self, new_rows: Sequence[Delivery]) -> list[Settlement]: ...

    def renew(self, rows: Sequence[Delivery]) -> Sequence[bool | None]: ...


class AsyncClaims:
    """`Claims` for the handlers. Belongs to one event loop.

    `claim` and `store` wait while the database is away; a caller may cancel them. A cancelled call may still
    reach the database. For `owners_first` seconds after the database's first answer no claim is taken over.
    The same holds after its first answer since trouble, or since so long a silence (ADR 20).
    """

    def __init__(self, claims: BlockingClaims, owners_first: float = OWNERS_FIRST) -> None:
        self._claims = claims
        self._owners_first = owners_first
        self._take_over = not owners_first
        self._until_take_over: asyncio.TimerHandle | None = None
        self._answered_at = float("-inf")
        self._claim: Batcher[Claim | Cancel, ClaimAnswer] = Batcher(
            lambda requests: claims.claim(requests, self._take_over),
            _LIMIT,
            shared=is_database_fault,
            name="claims",
        )
        self._store: Batcher[Delivery, Settlement] = Batcher(
            claims.store, _LIMIT, shared=is_database_fault, name="stores"
        )
        self._renewals = ThreadPoolExecutor(1, thread_name_prefix="renewals")
        self._trouble: str | None = None
        self._trouble_at = 0.0

    @property
    def trouble(self) -> str | None:
        """The database's last error text while it is away; None once nobody has asked it for a while."""
        return self._trouble if time.monotonic() - self._trouble_at < _TROUBLE_TTL else None

    async def claim(self, request: Claim | Cancel) -> ClaimAnswer:
        """Return the answer to one request. Requests reach the database in the order of the calls."""
        # After a silence the sender does not know whether the database was away.
        if asyncio.get_running_loop().time() - self._answered_at > self._owners_first:
            self._forbid_take_over()
        return await self._retried(self._claim.one, request)

    async def store(self, new_row: Delivery) -> Settlement:
        """Store what became of one claim, an outcome or its release; return whether that was stored."""
        return await self._retried(self._store.one, new_row)

    async def renew(self, rows: Sequence[Delivery]) -> Sequence[bool | None]:
        """Renew the leases of `rows` in one call, without a retry. Raises `sqlalchemy.exc.DBAPIError`."""
        loop = asyncio.get_running_loop()
        try:
            held = await loop.run_in_executor(self._renewals, self._claims.renew, rows)
        except Exception as error:
            self._note_trouble(error)
            raise
        self._answered()
        return held

    async def close(self) -> None:
        """Wait until all calls have ended; refuse later ones."""
        if self._until_take_over is not None:
            self._until_take_over.cancel()
        await self._claim.close()
        await self._store.close()
        self._renewals.shutdown(wait=False)

    async def _retried(self, call: Callable[[T], Awaitable[R]], item: T) -> R:
        try:
            result = await call(item)
        except Exception as error:
            if not is_database_fault(error):
                raise
            self._log_trouble(error)
            result = await retry_until_available(self._log_trouble, is_database_fault, most=_RETRY_SECONDS)(
                call, item
            )
        self._answered()
        return result

    def _log_trouble(self, error: BaseException) -> None:
        if self.trouble is None:
            log.warning("the database is away", error=error_text(error))
        self._note_trouble(error)

    def _note_trouble(self, error: BaseException) -> None:
        self._trouble, self._trouble_at = error_text(error), time.monotonic()
        self._forbid_take_over()

    def _forbid_take_over(self) -> None:
        self._take_over = not self._owners_first
        if self._until_take_over is not None:
            self._until_take_over.cancel()
            self._until_take_over = None

    def _answered(self) -> None:
        self._trouble = None
        loop = asyncio.get_running_loop()
        self._answered_at = loop.time()
        if self._take_over or self._until_take_over is not None:
            return
        self._until_take_over = loop.call_later(self._owners_first, self._allow_take_over)

    def _allow_take_over(self) -> None:
        self._take_over, self._until_take_over = True, None
