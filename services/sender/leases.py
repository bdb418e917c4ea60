"""The leases of a sender's claims: how long each claim is certainly its own, and their renewal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from services.common.database.errors import error_text
from services.common.deliveries.decide import Delivery
from services.sender.metrics import SENDER_LEASES_LOST

__all__ = ["Lease", "Leases"]

log = structlog.get_logger(__name__)

# A renewal that failed, or that missed a locked row, is tried again after this long (seconds) at most.
_RETRY_SECONDS = 1.0


class Lease:
    """One claim's lease, by this process's monotonic clock.

    It counts from before the database was asked. So it ends no later than the row says, however long the
    answer took or the process was frozen.
    """

    __slots__ = ("_clock", "ends", "row")

    def __init__(self, row: Delivery, ends: float, clock: Callable[[], float]) -> None:
        self.row = row
        self.ends = ends
        self._clock = clock

    def holds(self) -> bool:
        """Return whether the claim is certainly still this sender's."""
        return self._clock() < self.ends


class Leases:
    """The leases of all claims that this sender holds, renewed together every quarter of a lease.

    `renew` gets the rows and returns for each whether its claim is still held; None: not known, the lease
    stays as it was. While it raises (the database is away), the leases run out. `seconds` is a lease's
    length. Belongs to one event loop.
    """

    def __init__(
        self,
        renew: Callable[[Sequence[Delivery]], Awaitable[Sequence[bool | None]]],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._renew = renew
        self._seconds = seconds
        self._clock = clock
        self._held: set[Lease] = set()

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, row: Delivery, since: float) -> Lease:
        """Return the lease of a claim asked for at `since` (monotonic). It is renewed until dropped."""
        lease = Lease(row, since + self._seconds, self._clock)
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease) -> None:
        """Stop renewing this lease. Dropping it twice is allowed."""
        self._held.discard(lease)

    async def run(self) -> None:
        """Renew the leases until cancelled."""
        pause = self._seconds / 4
        while True:
            await asyncio.sleep(pause)
            try:
                known = await self.renew()
                pause = self._seconds / 4 if known else min(self._seconds / 4, _RETRY_SECONDS)
            except Exception as error:
                pause = min(self._seconds / 4, _RETRY_SECONDS)
                log.warning("leases not renewed", leases=len(self._held), error=error_text(error))

    async def renew(self) -> bool:
        """Renew all leases once; return whether the fate of each is known. Raises what `renew` raised."""
        leases = list(self._held)
        if not leases:
            return True
        known = True
        since = self._clock()
        for lease, still_held in zip(leases, await self._renew([lease.row for lease in leases]), strict=True):
            known = known and still_held is not None
            # A lease that was dropped meanwhile belongs to a settled claim: it was not lost.
            if lease in self._held and still_held is not None:
                lease.ends = since + self._seconds if still_held else float("-inf")
                if not still_held:
                    self._held.discard(lease)
                    SENDER_LEASES_LOST.inc()
        return known
