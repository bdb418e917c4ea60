"""The Watch RPC: from its request to its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import structlog

from postroad.v1 import task_service_pb2 as pb
from services.api import filters
from services.api.database_threads import DatabaseThreads
from services.api.errors import FieldViolation, InvalidArgument, StatusError, collect, draining, not_found
from services.api.filters import Filter
from services.api.metrics import WATCH_MESSAGES, WATCHERS
from services.api.validation import task_id
from services.api.watch import lookup, messages, tokens
from services.api.watch.catchup import CatchUp
from services.api.watch.changes import Change, Place
from services.api.watch.convoy import Convoys
from services.api.watch.feed import Feed, Joined
from services.api.watch.folded import Folded
from services.api.watch.lookup import Known
from services.api.watch.members import Member
from services.api.watch.problems import crowded, lagging
from services.api.watch.topics import TIMEOUT
from services.api.watch.traveller import PATIENCE
from services.api.watch.watchers import Told, Wanted, Watcher
from services.common.config import Settings

__all__ = ["MOST_WATCHERS", "Watches"]

log = structlog.get_logger(__name__)

MOST_WATCHERS = 1000
"""Streams of one replica; more are refused with RESOURCE_EXHAUSTED."""

_MOST_CATCHING_UP = 8
_LONGEST_PAUSE = 2.0

Write = Callable[[bytes], Awaitable[None]]


class Watches:
    """All streams of a replica, and the feed that they share while there are any."""

    def __init__(self, settings: Settings, threads: DatabaseThreads) -> None:
        self._settings, self._threads = settings, threads
        self._feed: Feed | None = None
        # Not the feeds themselves: what one remembers of the last tasks goes when nobody watches.
        self._old: set[Thread] = set()
        self._folded = Folded(settings)
        self._watchers: set[Watcher] = set()
        self._convoys = Convoys(asyncio.Semaphore(_MOST_CATCHING_UP), self._catch_up)
        # A consumer that is closed takes a thread beside those that read.
        self._executor = ThreadPoolExecutor(2 * _MOST_CATCHING_UP, thread_name_prefix="catchup")

    async def watch(self, tenant: str, request: pb.WatchRequest, write: Write) -> None:
        """Write the stream's messages until it is ended. Raises StatusError."""
        wanted = _wanted(tenant, request)
        token = request.resume_token
        positions = tokens.parse(token, wanted.digest()) if token else None
        if len(self._watchers) >= MOST_WATCHERS:
            raise crowded()
        try:
            async with asyncio.timeout(None) as scope:
                watcher = Watcher(wanted, scope)
                stream = _Stream(wanted, write)
                feed = self._used()
                self._watchers.add(watcher)
                WATCHERS.set(len(self._watchers))
                try:
                    await feed.stand()
                    if positions is not None:
                        await self._resume(feed, watcher, stream, positions)
                    elif wanted.task is not None:
                        await self._show(feed, watcher, stream, request.id)
                    else:
                        await stream.stand(feed.join(watcher))
                    while True:
                        await stream.send(await watcher.next())
                finally:
                    feed.leave(watcher)
                    self._unused(feed)
                    self._watchers.discard(watcher)
                    WATCHERS.set(len(self._watchers))
        except TimeoutError:
            assert watcher.problem is not None
            raise watcher.problem from None

    def drain(self) -> None:
        """End every stream; a client goes on at another replica from its last token."""
        for watcher in list(self._watchers):
            watcher.end(draining())

    async def close(self) -> None:
        """Wait until nothing reads any more; after `drain`."""
        if self._feed is not None:
            self._feed.stop()
            self._old.add(self._feed.thread)
        for thread in self._old:
            await asyncio.to_thread(thread.join, 3 * TIMEOUT)
        await asyncio.to_thread(self._folded.close)
        self._executor.shutdown(wait=False)

    async def _show(self, feed: Feed, watcher: Watcher, stream: _Stream, id_: str) -> None:
        """Send the task as it stands in the database, then what is not in there yet and what comes."""
        tenant, task = watcher.wanted.tenant, watcher.wanted.task
        assert task is not None

        async def begin(missed: CatchUp) -> Told:
            # Asked before the database is: what stands before these positions is in it by then.
            await missed.begin_at_the_fold(self._folded)
            found = await self._threads.run(lambda connection: lookup.snapshot(connection, tenant, task))
            if found is None:
                raise not_found(id_)
            view, stream.said = found
            return Told(messages.found(view), missed.sure.text, "")

        await self._convoys.show(feed, watcher, begin, stream.send_soon)

    async def _resume(
        self, feed: Feed, watcher: Watcher, stream: _Stream, positions: Mapping[Place, int]
    ) -> None:
        """Send what was missed, and what comes."""
        await stream.stand(await self._convoys.resume(feed, watcher, positions, stream.send_soon))

    def _catch_up(self, members: Sequence[Member]) -> CatchUp:
        return CatchUp(self._settings, self._executor, members, self._known)

    # --- the feed ----------------------------------------------------------------------------

    def _used(self) -> Feed:
        if self._feed is None:
            self._feed = Feed(self._settings, self._known_at_last, self._lost)
        self._feed.users += 1
        return self._feed

    def _unused(self, feed: Feed) -> None:
        feed.users -= 1
        if not feed.users:
            feed.stop()
            self._lost(feed)

    def _lost(self, feed: Feed) -> None:
        """Let the next watcher begin a new feed."""
        if self._feed is feed:
            self._feed = None
        self._old = {old for old in self._old if old.is_alive()} | {feed.thread}

    async def _known(self, strangers: Sequence[Change]) -> Known:
        return await self._threads.run(lambda connection: lookup.known(connection, strangers))

    async def _known_at_last(self, strangers: Sequence[Change]) -> Known:
        """The same, as long as it takes: the streams wait while the database is away."""
        pause = 0.1
        while True:
            try:
                return await self._known(strangers)
            except StatusError as problem:
                log.warning("watchers wait", cause=problem.message)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)


class _Stream:
    """What is written to one client. `said` are keys of changes that it knows of from the task's state."""

    def __init__(self, wanted: Wanted, write: Write) -> None:
        self._bound, self._write = tokens.bound(wanted.digest()), write
        self.said: Collection[str] = ()

    async def stand(self, joined: Joined) -> None:
        """Send where the client stands."""
        await self.send(Told(b"", joined.text, ""))

    async def send_soon(self, told: Told) -> None:
        """Send what was missed. Raises StatusError where it is not taken in time."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.send(told)
        except TimeoutError:
            raise lagging() from None

    async def send(self, told: Told) -> None:
        """Send a message."""
        if told.key not in self.said:
            await self._write(told.body + messages.token(self._bound + told.positions))
            WATCH_MESSAGES.inc()


def _wanted(tenant: str, request: pb.WatchRequest) -> Wanted:
    refused: list[FieldViolation] = []
    asked = collect(refused, filters.parse, request)
    task = collect(refused, task_id, request.id) if request.id else None
    if request.id and asked not in (None, Filter()):
        refused.append(FieldViolation("id", "is not for use together with a filter"))
    if refused or asked is None:
        raise InvalidArgument(refused)
    return Wanted(tenant, task, asked)
