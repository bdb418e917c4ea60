"""Those who watch: what they want, what waits for them, and who wants a change. Nothing here blocks."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from services.api.errors import StatusError
from services.api.filters import Filter
from services.api.watch.problems import lagging
from services.common.fold import TaskRow

__all__ = ["MOST_QUEUED", "Index", "Told", "Wanted", "Watcher"]

MOST_QUEUED = 20_000
"""Messages that may wait for one watcher. They are shared: a change weighs the same for one and for all."""


class Told(NamedTuple):
    """A message: task and change, serialized; where to go on after it; the change's key, empty for none."""

    body: bytes
    positions: str
    key: str


class Wanted(NamedTuple):
    """One task of a tenant, or those that a filter takes."""

    tenant: str
    task: bytes | None
    filter: Filter

    def digest(self) -> bytes:
        """Return what stands for this in a resume token."""
        if self.task is None:
            return self.filter.digest(self.tenant)
        return blake2b(repr((2, self.tenant, self.task)).encode(), digest_size=16).digest()

    def takes(self, row: TaskRow) -> bool:
        """Whether a task that stands like this is wanted, as List would say."""
        if row.tenant != self.tenant:
            return False
        if self.task is not None:
            return row.id == self.task
        asked = self.filter
        return (
            (not asked.status or row.status in asked.status)
            and asked.email in (None, row.recipient)
            and asked.domain in (None, row.domain)
            and asked.reason in (None, row.reason)
            and (not asked.labels or _labels(row).items() >= dict(asked.labels).items())
        )

    def key(self) -> Hashable:
        """Return the one thing by which an Index finds this."""
        asked = self.filter
        if self.task is not None:
            return self.task
        if asked.email is not None:
            return self.tenant, "email", asked.email
        if asked.labels:
            return self.tenant, "label", *asked.labels[0]
        if asked.domain is not None:
            return self.tenant, "domain", asked.domain
        return self.tenant


class Watcher:
    """One stream's queue. `scope` is the stream's timeout, not set: ending the watcher sets it off."""

    def __init__(self, wanted: Wanted, scope: asyncio.Timeout) -> None:
        self.wanted, self._scope = wanted, scope
        self.problem: StatusError | None = None
        self._queue: deque[Told] = deque()
        self._filled = asyncio.Event()

    def put(self, told: Told) -> None:
        """Queue a message. Where too many wait, the watcher is ended; it may resume."""
        if self.problem is not None:
            return
        if len(self._queue) >= MOST_QUEUED:
            self.end(lagging())
            return
        self._queue.append(told)
        self._filled.set()

    async def next(self) -> Told:
        """Return what waits first, once there is anything."""
        while not self._queue:
            self._filled.clear()
            await self._filled.wait()
        return self._queue.popleft()

    @property
    def waiting(self) -> int:
        """How many messages wait."""
        return len(self._queue)

    def end(self, problem: StatusError) -> None:
        """End the stream with this; what waits for it is dropped. Never raises: others are told after it."""
        if self.problem is None:
            self.problem = problem
            self._queue.clear()
            # The stream may be over already: its client has left.
            with contextlib.suppress(RuntimeError):
                self._scope.reschedule(asyncio.get_running_loop().time())


class Index:
    """Watchers, found by the changes that they want."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, dict[Watcher, None]] = {}

    def __iter__(self) -> Iterator[Watcher]:
        return (watcher for found in list(self._by_key.values()) for watcher in list(found))

    def add(self, watcher: Watcher) -> None:
        """Add a watcher."""
        self._by_key.setdefault(watcher.wanted.key(), {})[watcher] = None

    def remove(self, watcher: Watcher) -> None:
        """Remove a watcher, if it is there."""
        key = watcher.wanted.key()
        found = self._by_key.get(key, {})
        found.pop(watcher, None)
        if not found:
            self._by_key.pop(key, None)

    def find(self, row: TaskRow) -> list[Watcher]:
        """Return who wants a task that stands like this."""
        return [
            watcher
            for key in _keys(row)
            for watcher in self._by_key.get(key, ())
            if watcher.wanted.takes(row)
        ]


def _keys(row: TaskRow) -> Iterable[Hashable]:
    tenant = row.tenant
    yield from (row.id, tenant, (tenant, "email", row.recipient), (tenant, "domain", row.domain))
    for name, value in _labels(row).items():
        yield tenant, "label", name, value


def _labels(row: TaskRow) -> dict[str, str]:
    return json.loads(row.labels) if row.labels else {}
