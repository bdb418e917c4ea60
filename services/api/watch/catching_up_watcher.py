"""A watcher in catch-up: the queue of what it missed, and how long its client may make others wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

from services.api.bounded_io import WRITE_TIMEOUT
from services.api.watch.errors import resume_token_expired, watcher_lags
from services.api.watch.live_reader import JoinPoint, LiveReader
from services.api.watch.messages import WatchMessage
from services.api.watch.subscribers import Subscriber
from services.api.watch.watchers import Watcher
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["BLOCKING_TIMEOUT", "CatchingUpWatcher"]

BLOCKING_TIMEOUT = 5.0
"""Seconds in all that a client may make others wait by reading few messages or none."""

_MAX_QUEUED = 100
# While the queue is full, the api checks so often (seconds) whether the client read at least so many.
# With a few hundred watchers on one event loop, a client that reads without a pause still reads more.
_CHECK_INTERVAL, _FEW = 0.25, 5


class CatchingUpWatcher(Subscriber):
    """A subscriber of a catch-up. What it missed waits in its queue until its stream writes it.

    `slot_wanted` returns whether anyone waits for a catch-up slot. The group sets `peers` and `task`.
    """

    def __init__(
        self,
        live_reader: LiveReader,
        watcher: Watcher,
        positions: Mapping[TopicPartition, int],
        slot_wanted: Callable[[], bool],
    ) -> None:
        super().__init__(watcher, positions)
        self.live_reader, self._slot_wanted = live_reader, slot_wanted
        self.join_point: JoinPoint | None = None
        self.has_left = False
        self.peers: set[CatchingUpWatcher] = set()
        self.task: asyncio.Task[None] | None = None
        self._blocked_seconds = 0.0
        self._queue: deque[WatchMessage] = deque()
        self._filled, self._drained = asyncio.Event(), asyncio.Event()

    async def put(self, message: WatchMessage) -> None:
        """Queue a message. Wait while the queue is full; end the watcher where its client is too slow."""
        if len(self._queue) >= _MAX_QUEUED and not self.has_left and not await self._wait_drained():
            self.watcher.end(watcher_lags())
            self.leave()
        self.put_nowait(message)

    def put_nowait(self, message: WatchMessage) -> None:
        """Queue a message, even where the queue is full."""
        if not self.has_left:
            self._queue.append(message)
            self._filled.set()

    def joined(self, join_point: JoinPoint) -> None:
        """End `missed` after the queued messages: the watcher has joined the live reader here."""
        self.join_point = join_point
        self._filled.set()

    async def missed(self) -> AsyncIterator[WatchMessage]:
        """Yield what the watcher missed, until it has joined the live reader."""
        while self._queue or self.join_point is None:
            self._filled.clear()
            if not self._queue:
                await self._filled.wait()
            while self._queue:
                yield self._queue.popleft()
                if len(self._queue) <= _MAX_QUEUED // 2:
                    self._drained.set()

    def expire(self) -> None:
        """End the watcher, since records that it missed were deleted. Its peers continue."""
        self.watcher.end(resume_token_expired())
        self.leave()

    def leave(self) -> None:
        """Leave the group. The last one to leave ends the catch-up."""
        self.has_left = True
        self._queue.clear()
        self._drained.set()
        self.peers.discard(self)
        if self.task is not None and not self.peers:
            self.task.cancel()

    async def _wait_drained(self) -> bool:
        """Wait until the client has read half of the queue; return False where it takes too long."""
        self._drained.clear()
        deadline = time.monotonic() + WRITE_TIMEOUT
        while (start := time.monotonic()) < deadline:
            before = len(self._queue)
            try:
                async with asyncio.timeout(_CHECK_INTERVAL):
                    await self._drained.wait()
                return True
            except TimeoutError:
                pass
            if before - len(self._queue) < _FEW and (self._slot_wanted() or self._blocks_peers()):
                self._blocked_seconds += time.monotonic() - start
                if self._blocked_seconds > BLOCKING_TIMEOUT:
                    return False
        return False

    def _blocks_peers(self) -> bool:
        """Return whether a peer has read all its messages. A peer that is as slow is not blocked."""
        return any(not peer._queue for peer in self.peers)
