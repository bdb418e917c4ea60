"""Verdicts kept for as long as they hold, and one lookup at a time for each domain."""

import asyncio
from collections.abc import Awaitable, Callable

from services.validator.mx import Kind, Verdict, not_a_domain
from services.validator.names import to_ascii

__all__ = ["VerdictCache"]


class VerdictCache:
    """The verdicts of `lookup`, each kept for its own `ttl`.

    `clock` is monotonic, in seconds. `transient_ttl` caps the time for which trouble with the DNS is
    believed; keep it under the shortest retry delay, or a retry meets the verdict that it was to wait out.
    At most `size` domains are kept, the longest known go first. One event loop's own; no locks.
    """

    def __init__(
        self,
        lookup: Callable[[str], Awaitable[Verdict]],
        clock: Callable[[], float],
        *,
        transient_ttl: float = 30.0,
        size: int = 50_000,
    ) -> None:
        self._lookup = lookup
        self._clock = clock
        self._transient_ttl = transient_ttl
        self._size = size
        self._kept: dict[str, tuple[float, Verdict]] = {}
        self._flights: dict[str, asyncio.Task[Verdict]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, domain: str) -> Verdict | None:
        """The verdict on `domain` (in A-label form; no other is found) if one is kept and still holds."""
        kept = self._kept.get(domain)
        return kept[1] if kept is not None and self._clock() < kept[0] else None

    async def resolve(self, domain: str) -> Verdict:
        """The verdict on `domain` in any form, kept or new.

        Callers of the same domain share one lookup, which goes on when some or all of them are cancelled.
        Raises what the lookup raises, to each of them.
        """
        try:
            name = to_ascii(domain)
        except ValueError as error:
            return not_a_domain(str(error))
        if (verdict := self.get(name)) is not None:
            return verdict
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = asyncio.create_task(self._fly(name), name=f"mx {name}")
            flight.add_done_callback(lambda done: self._land(name, done))
        return await asyncio.shield(flight)

    async def close(self) -> None:
        """Cancels the lookups under way and waits until they are gone; their callers are cancelled too."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _fly(self, name: str) -> Verdict:
        verdict = await self._lookup(name)
        ttl = min(verdict.ttl, self._transient_ttl) if verdict.kind is Kind.TRANSIENT else verdict.ttl
        # A new insertion, not an update: the order of the dictionary is the order of learning.
        self._kept.pop(name, None)
        self._kept[name] = (self._clock() + ttl, verdict)
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return verdict

    def _land(self, name: str, flight: asyncio.Task[Verdict]) -> None:
        del self._flights[name]
        if not flight.cancelled():
            flight.exception()  # with every caller cancelled nobody else would retrieve it
