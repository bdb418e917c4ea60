"""A cache of verdicts, with one lookup at a time for each domain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import NamedTuple

from services.validator.mx import Verdict, VerdictKind, not_a_domain
from services.validator.names import to_ascii

__all__ = ["VerdictCache"]


class _LookupStart(NamedTuple):
    """When a lookup began, by the cache's clock, and whether it used nothing that was known before."""

    at: float
    fresh: bool


class _CacheEntry(NamedTuple):
    asked: _LookupStart
    until: float
    verdict: Verdict


class _PendingLookup(NamedTuple):
    asked: _LookupStart
    task: asyncio.Task[Verdict]


class VerdictCache:
    """Keeps each verdict of `lookup` for the verdict's `ttl`. Belongs to one event loop.

    `lookup` gets the domain and whether it must be fresh: use nothing that is known already. `clock` is
    monotonic, in seconds. `transient_ttl` caps how long a transient verdict is kept. It must be less than the
    shortest retry delay, or a retry would meet the verdict that caused it. The cache keeps at most `size`
    domains and drops the oldest first.
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
        self._entries: dict[str, _CacheEntry] = {}
        self._pending: dict[str, _PendingLookup] = {}
        self._tasks: set[asyncio.Task[Verdict]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, domain: str, max_age: float = inf) -> Verdict | None:
        """Return the valid verdict on `domain`, which must be in A-label form; None if there is none.

        `max_age` (seconds) accepts only a verdict of a fresh lookup that began no longer ago.
        """
        entry = self._entries.get(domain)
        if entry is None or self._clock() >= entry.until or not self._is_fresh_enough(entry.asked, max_age):
            return None
        return entry.verdict

    async def resolve(self, domain: str, max_age: float = inf) -> Verdict:
        """Return the verdict on `domain`, in any form, from the cache (as `get` does) or from a lookup.

        Callers of the same domain share one lookup, which goes on if they are cancelled. Each of them raises
        what the lookup raises.
        """
        try:
            name = to_ascii(domain)
        except ValueError as error:
            return not_a_domain(str(error))
        if (verdict := self.get(name, max_age)) is not None:
            return verdict
        pending = self._pending.get(name)
        if pending is None or not self._is_fresh_enough(pending.asked, max_age):
            asked = _LookupStart(self._clock(), fresh=max_age < inf)
            task = asyncio.create_task(self._run_lookup(name, asked), name=f"mx {name}")
            pending = self._pending[name] = _PendingLookup(asked, task)
            self._tasks.add(task)
            task.add_done_callback(partial(self._lookup_done, name, pending))
        return await asyncio.shield(pending.task)

    async def close(self) -> None:
        """Cancel the lookups under way, and so their callers, and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_fresh_enough(self, asked: _LookupStart, max_age: float) -> bool:
        return max_age == inf or (asked.fresh and self._clock() - asked.at <= max_age)

    async def _run_lookup(self, name: str, asked: _LookupStart) -> Verdict:
        verdict = await self._lookup(name, asked.fresh)
        entry = self._entries.get(name)
        if entry is not None and entry.asked.at > asked.at:
            # A lookup that began later ended before this one.
            return verdict
        ttl = min(verdict.ttl, self._transient_ttl) if verdict.kind is VerdictKind.TRANSIENT else verdict.ttl
        # Insert anew instead of updating, so that the dictionary is in the order of age.
        self._entries.pop(name, None)
        self._entries[name] = _CacheEntry(asked, self._clock() + ttl, verdict)
        if len(self._entries) > self._size:
            del self._entries[next(iter(self._entries))]
        return verdict

    def _lookup_done(self, name: str, pending: _PendingLookup, task: asyncio.Task[Verdict]) -> None:
        self._tasks.discard(task)
        if self._pending.get(name) is pending:
            del self._pending[name]
        if not task.cancelled():
            task.exception()  # if every caller was cancelled, nobody else retrieves it
