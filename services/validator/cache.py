"""Verdicts kept for as long as they hold, and one lookup at a time for each domain."""

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
    """When a lookup began, by the cache's clock, and whether it asked all anew."""

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
        self._kept: dict[str, _CacheEntry] = {}
        self._pending: dict[str, _PendingLookup] = {}
        self._tasks: set[asyncio.Task[Verdict]] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, domain: str, max_age: float = inf) -> Verdict | None:
        """The verdict on `domain` (in A-label form; no other is found) if one is kept and still holds.

        With `max_age` (seconds) only one for which all was asked anew, and no longer ago than that.
        """
        kept = self._kept.get(domain)
        if kept is None or self._clock() >= kept.until or not self._is_fresh_enough(kept.asked, max_age):
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
        pending = self._pending.get(name)
        if pending is None or not self._is_fresh_enough(pending.asked, max_age):
            asked = _LookupStart(self._clock(), fresh=max_age < inf)
            task = asyncio.create_task(self._run_lookup(name, asked), name=f"mx {name}")
            pending = self._pending[name] = _PendingLookup(asked, task)
            self._tasks.add(task)
            task.add_done_callback(partial(self._lookup_done, name, pending))
        return await asyncio.shield(pending.task)

    async def close(self) -> None:
        """Cancels the lookups under way and waits until they are gone; their callers are cancelled too."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_fresh_enough(self, asked: _LookupStart, max_age: float) -> bool:
        return max_age == inf or (asked.fresh and self._clock() - asked.at <= max_age)

    async def _run_lookup(self, name: str, asked: _LookupStart) -> Verdict:
        verdict = await self._lookup(name, asked.fresh)
        kept = self._kept.get(name)
        if kept is not None and kept.asked.at > asked.at:
            # One that was begun later has come before this one.
            return verdict
        ttl = min(verdict.ttl, self._transient_ttl) if verdict.kind is VerdictKind.TRANSIENT else verdict.ttl
        # A new insertion, not an update: the order of the dictionary is the order of learning.
        self._kept.pop(name, None)
        self._kept[name] = _CacheEntry(asked, self._clock() + ttl, verdict)
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return verdict

    def _lookup_done(self, name: str, pending: _PendingLookup, task: asyncio.Task[Verdict]) -> None:
        self._tasks.discard(task)
        if self._pending.get(name) is pending:
            del self._pending[name]
        if not task.cancelled():
            task.exception()  # with every caller cancelled nobody else would retrieve it
