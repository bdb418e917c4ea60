"""Watchers: what each selects, the messages that wait for it, and an index of them. Never blocks."""

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
from services.api.watch.errors import watcher_lags
from services.api.watch.messages import WatchMessage
from services.common.fold import TaskRow

__all__ = ["MAX_QUEUED", "WatchSelection", "Watcher", "WatcherIndex"]

MAX_QUEUED = 20_000
"""Messages that may wait for one watcher. Watchers share them, so a message occupies its memory once."""


class WatchSelection(NamedTuple):
    """The tasks that a watcher selects: one task of a tenant, or those that match a filter."""

    tenant: str
    task: bytes | None
    filter: Filter

    def digest(self) -> bytes:
        """Return 16 bytes that identify this selection in a resume token."""
        if self.task is None:
            return self.filter.digest(self.tenant)
        return blake2b(repr((2, self.tenant, self.task)).encode(), digest_size=16).digest()

    def matches(self, row: TaskRow) -> bool:
        """Return whether the task with this row is selected. List selects in the same way."""
        if row.tenant != self.tenant:
            return False
        if self.task is not None:
            return row.id == self.task
        filter_ = self.filter
        return (
            (not filter_.status or row.status in filter_.status)
            and filter_.email in (None, row.recipient)
            and filter_.domain in (None, row.domain)
            and filter_.reason in (None, row.reason)
            and (not filter_.labels or _labels(row).items() >= dict(filter_.labels).items())
        )

    def index_key(self) -> Hashable:
        """Return the one key under which a WatcherIndex stores this selection."""
        filter_ = self.filter
        if self.task is not None:
            return self.task
        if filter_.email is not None:
            return self.tenant, "email", filter_.email
        if filter_.labels:
            return self.tenant, "label", *filter_.labels[0]
        if filter_.domain is not None:
            return self.tenant, "domain", filter_.domain
        return self.tenant


class Watcher:
    """One stream's queue of messages. `scope` is the stream's timeout, which `end` triggers."""

    def __init__(self, selection: WatchSelection, scope: asyncio.Timeout) -> None:
        self.selection, self._scope = selection, scope
        self.error: StatusError | None = None
        self._queue: deque[WatchMessage] = deque()
        self._filled = asyncio.Event()

    def put(self, message: WatchMessage) -> None:
        """Queue a message. End the watcher, which may resume, where too many wait."""
        if self.error is not None:
            return
        if len(self._queue) >= MAX_QUEUED:
            self.end(watcher_lags())
            return
        self._queue.append(message)
        self._filled.set()

    async def next(self) -> WatchMessage:
        """Wait for the next message and return it."""
        while not self._queue:
            self._filled.clear()
            await self._filled.wait()
        return self._queue.popleft()

    @property
    def waiting(self) -> int:
        """The number of messages that wait."""
        return len(self._queue)

    def end(self, error: StatusError) -> None:
        """End the stream with this error and drop its messages. Never raises, since others may follow."""
        if self.error is None:
            self.error = error
            self._queue.clear()
            # After the client has left, its timeout can no longer be triggered.
            with contextlib.suppress(RuntimeError):
                self._scope.reschedule(asyncio.get_running_loop().time())


class WatcherIndex:
    """Finds the watchers that select a task."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, dict[Watcher, None]] = {}

    def __iter__(self) -> Iterator[Watcher]:
        return (watcher for found in list(self._by_key.values()) for watcher in list(found))

    def add(self, watcher: Watcher) -> None:
        """Add a watcher."""
        self._by_key.setdefault(watcher.selection.index_key(), {})[watcher] = None

    def remove(self, watcher: Watcher) -> None:
        """Remove a watcher, if it is in the index."""
        key = watcher.selection.index_key()
        found = self._by_key.get(key, {})
        found.pop(watcher, None)
        if not found:
            self._by_key.pop(key, None)

    def find(self, row: TaskRow) -> list[Watcher]:
        """Return the watchers that select the task with this row."""
        return [
            watcher
            for key in _index_keys(row)
            for watcher in self._by_key.get(key, ())
            if watcher.selection.matches(row)
        ]


def _index_keys(row: TaskRow) -> Iterable[Hashable]:
    tenant = row.tenant
    yield from (row.id, tenant, (tenant, "email", row.recipient), (tenant, "domain", row.domain))
    for name, value in _labels(row).items():
        yield tenant, "label", name, value


def _labels(row: TaskRow) -> dict[str, str]:
    return json.loads(row.labels) if row.labels else {}
