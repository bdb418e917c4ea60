"""Verdicts kept for as long as they hold, and one lookup at a time for each domain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import NamedTuple

from services.validator.mx import Kind, Verdict, not_a_domain
from services.validator.names import to_ascii

__all__ = ["VerdictCache"]


class _Asked(NamedTuple):
    """When a lookup began, by the cache's clock, and whether it asked all anew."""

    at: float
    fresh: bool


class _Kept(NamedTuple):
    asked: _Asked
    until: float
    verdict: Verdict


class _Flight(NamedTuple):
    asked: _Asked
    task: asyncio.Task[Verdict]


class VerdictCache:
    """The verdicts of `lookup`, each kept for its own `ttl`.

    `lookup` is told whether all must be asked anew. `clock` is monotonic, in seconds. `transient_ttl` caps
    the time for which trouble with the DNS is believed; keep it under the shortest retry delay, or a retry
    meets the verdict that it was to wait out. At most `size` domains are kept, the longest known go first.
    One event loop's own; no locks.
    """

    def __init__(
        self,
        lookup: Callable[[str, bool], Awaitable[Verdict]],
        clock: Callable[[], float],
        *,
        transient_ttl: float = 30.0,
        size: int = 50_000,
    ) -> None:
        self._lookup = lookup
        self._clock = clock
        self._transient_ttl = transient_ttl
        self._size = size
        self._kept: dict[str, _Kept] = {}
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[Verdict]] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, domain: str, max_age: float = inf) -> Verdict | None:
        """The verdict on `domain` (in A-label form; no other is found) if one is kept and still holds.

        With `max_age` (seconds) only one for which all was asked anew, and no longer ago than that.
        """
        kept = self._kept.get(domain)
        if kept is None or self._clock() >= kept.until or not self._serves(kept.asked, max_age):
            return None
        return kept.verdict

    async def resolve(self, domain: str, max_age: float = inf) -> Verdict:
        """The verdict on `domain` in any form, kept (as `get` has it) or new.

        Callers of the same domain share one lookup, which goes on when some or all of them are cancelled.
        Raises what the lookup raises, to each of them.
        """
        try:
            name = to_ascii(domain)
        except ValueError as error:
            return not_a_domain(str(error))
        if (verdict := self.get(name, max_age)) is not None:
            return verdict
        flight = self._flights.get(name)
        if flight is None or not self._serves(flight.asked, max_age):
            asked = _Asked(self._clock(), fresh=max_age < inf)
            task = asyncio.create_task(self._fly(name, asked), name=f"mx {name}")
            flight = self._flights[name] = _Flight(asked, task)
            self._tasks.add(task)
            task.add_done_callback(partial(self._land, name, flight))
        return await asyncio.shield(flight.task)

    async def close(self) -> None:
        """Cancels the lookups under way and waits until they are gone; their callers are cancelled too."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _serves(self, asked: _Asked, max_age: float) -> bool:
        return max_age == inf or (asked.fresh and self._clock() - asked.at <= max_age)

    async def _fly(self, name: str, asked: _Asked) -> Verdict:
        verdict = await self._lookup(name, asked.fresh)
        kept = self._kept.get(name)
        if kept is not None and kept.asked.at > asked.at:
            # One that was begun later has come before this one.
            return verdict
        ttl = min(verdict.ttl, self._transient_ttl) if verdict.kind is Kind.TRANSIENT else verdict.ttl
        # A new insertion, not an update: the order of the dictionary is the order of learning.
        self._kept.pop(name, None)
        self._kept[name] = _Kept(asked, self._clock() + ttl, verdict)
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return verdict

    def _land(self, name: str, flight: _Flight, task: asyncio.Task[Verdict]) -> None:
        self._tasks.discard(task)
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not task.cancelled():
            task.exception()  # with every caller cancelled nobody else would retrieve it
