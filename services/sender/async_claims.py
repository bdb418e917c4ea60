"""The claims for the event loop: calls run on worker threads, and are repeated while the database is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

import structlog

from services.common.database.errors import error_text, is_database_fault
from services.common.database.transactions import retry_until_available
from services.common.deliveries.decide import Cancel, Claim, ClaimAnswer, Delivery
from services.common.deliveries.settlement import Settlement

__all__ = ["AsyncClaims", "BlockingClaims"]

log = structlog.get_logger(__name__)

T = TypeVar("T")
R = TypeVar("R")

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
    """`Claims` on worker threads. Belongs to one event loop.

    Claims and stores wait while the database is away; a cancelled call may still reach the database.
    For `owners_first` seconds after the database's first answer no claim is taken over. The same holds after
    its first answer since trouble, or since so long a silence (ADR 20).
    """

    def __init__(self, claims: BlockingClaims, owners_first: float = OWNERS_FIRST) -> None:
        self._claims = claims
        self._owners_first = owners_first
        self._take_over = not owners_first
        self._until_take_over: asyncio.TimerHandle | None = None
        self._answered_at = float("-inf")
        self._claim: _Calls[Claim | Cancel, ClaimAnswer] = _Calls(
            lambda requests: claims.claim(requests, self._take_over),
            self._answered,
            self._log_trouble,
            "claims",
        )
        self._store: _Calls[Delivery, Settlement] = _Calls(
            claims.store, self._answered, self._log_trouble, "stores"
        )
        self._renewals = ThreadPoolExecutor(1, thread_name_prefix="renewals")
        self._trouble: str | None = None
        self._trouble_at = 0.0

    @property
    def trouble(self) -> str | None:
        """The database's last error text while it is away; None once nobody has asked it for a while."""
        return self._trouble if time.monotonic() - self._trouble_at < _TROUBLE_TTL else None

    async def claim_all(self, requests: Sequence[Claim | Cancel]) -> list[ClaimAnswer | Exception]:
        """Return the answer to each request, or its error. Waits while the database is away.

        Raises RuntimeError once closed.
        """
        # After a silence the sender does not know whether the database was away.
        if asyncio.get_running_loop().time() - self._answered_at > self._owners_first:
            self._forbid_take_over()
        return await self._claim(requests)

    async def store_all(self, new_rows: Sequence[Delivery]) -> list[Settlement | Exception]:
        """Store what became of each claim, an outcome or its release; return whether that was stored."""
        return await self._store(new_rows)

    async def claim(self, request: Claim | Cancel) -> ClaimAnswer:
        """Return the answer to one request. Raises its error."""
        [answer] = await self.claim_all([request])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def store(self, new_row: Delivery) -> Settlement:
        """Store what became of one claim. Raises its error."""
        [settlement] = await self.store_all([new_row])
        if isinstance(settlement, Exception):
            raise settlement
        return settlement

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


class _Calls(Generic[T, R]):
    """Calls of one method on a thread of their own, each again while the database is away."""

    def __init__(
        self,
        call: Callable[[Sequence[T]], Sequence[R]],
        on_answer: Callable[[], None],
        on_trouble: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._call_in_halves = partial(_in_halves, call)
        self._on_answer, self._on_trouble = on_answer, on_trouble
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._running = 0
        self._ended: asyncio.Future[None] | None = None

    async def __call__(self, items: Sequence[T]) -> list[R | Exception]:
        """Return the result of each item, or its error. Raises RuntimeError once closed."""
        if self._ended is not None:
            raise RuntimeError("the claims are closed")
        self._running += 1
        try:
            return await self._until_available(items)
        finally:
            self._running -= 1
            if self._ended is not None and not self._running and not self._ended.done():
                self._ended.set_result(None)

    async def close(self) -> None:
        """Refuse new calls, and wait until all earlier ones have ended."""
        self._ended = asyncio.get_running_loop().create_future()
        if self._running:
            await self._ended
        self._thread.shutdown(wait=False)

    async def _until_available(self, items: Sequence[T]) -> list[R | Exception]:
        try:
            results = await self._call(items)
        except Exception as error:
            if not is_database_fault(error):
                raise
            self._on_trouble(error)
            again = retry_until_available(self._on_trouble, is_database_fault, most=_RETRY_SECONDS)
            results = await again(self._call, items)
        self._on_answer()
        return results

    async def _call(self, items: Sequence[T]) -> list[R | Exception]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._call_in_halves, items)


def _in_halves(call: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | Exception]:
    """Return the call's results. After an error call with each half, so that a faulty item fails alone.

    Raises the error of a database that is away.
    """
    try:
        return list(call(items))
    except Exception as error:
        if is_database_fault(error):
            raise
        if len(items) == 1:
            return [error]
        middle = len(items) // 2
        return [*_in_halves(call, items[:middle]), *_in_halves(call, items[middle:])]
