"""How long each claim is surely still ours, and its renewal."""

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

# Seconds until a renewal that failed, or that a lock kept from a row, is tried again, where a quarter of the
# lease would be longer.
_RETRY_SECONDS = 1.0


class Lease:
    """One claim's lease, by this process's monotonic clock.

    It is measured from before the database was asked, so it ends no later than the row says, however
    long the answer took or the process stood still.
    """

    __slots__ = ("_clock", "ends", "row")

    def __init__(self, row: Delivery, ends: float, clock: Callable[[], float]) -> None:
        self.row = row
        self.ends = ends
        self._clock = clock

    def holds(self) -> bool:
        """Whether nobody else can have taken the claim by now."""
        return self._clock() < self.ends


class Leases:
    """The leases of all claims in hand, renewed together every quarter of their length.

    `renew` gets the rows and answers which are still ours (None: not known, the lease stays as it was);
    what it raises (the database is away) leaves the leases to run out by themselves. `seconds` is the
    lease's length. Belongs to one event loop.
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
        """Return the lease of a claim that was asked for at `since`; it is renewed until dropped."""
        lease = Lease(row, since + self._seconds, self._clock)
        self._held.add(lease)
        return lease

    def drop(self, lease: Lease) -> None:
        """Renew this lease no more. Dropping it twice is fine."""
        self._held.discard(lease)

    async def run(self) -> None:
        """Renew for ever; ends by being cancelled."""
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
        """Renew all leases in hand once; return whether it is known of each what became of it.

        Raises what `renew` raised.
        """
        leases = list(self._held)
        if not leases:
            return True
        known = True
        since = self._clock()
        for lease, ours in zip(leases, await self._renew([lease.row for lease in leases]), strict=True):
            known = known and ours is not None
            # One dropped meanwhile was settled meanwhile: nothing was lost.
            if lease in self._held and ours is not None:
                lease.ends = since + self._seconds if ours else float("-inf")
                if not ours:
                    self._held.discard(lease)
                    SENDER_LEASES_LOST.inc()
        return known
