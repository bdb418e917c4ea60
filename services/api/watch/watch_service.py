"""The Watch RPC: runs each stream from its request to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from postroad.v1 import task_service_pb2 as pb
from services.api import filters
from services.api.bounded_io import WRITE_TIMEOUT
from services.api.database_threads import DatabaseThreads
from services.api.errors import InvalidArgument, StatusError, Violation, collect, draining, not_found
from services.api.filters import Filter
from services.api.metrics import WATCH_MESSAGES, WATCHERS
from services.api.token_keys import TokenKeys
from services.api.validation import task_id
from services.api.watch import lookup, messages, resume_tokens
from services.api.watch.catch_up import CatchUp
from services.api.watch.catch_up_groups import CatchUpGroups
from services.api.watch.catch_up_slots import CatchUpSlots
from services.api.watch.changes import Change
from services.api.watch.errors import too_many_watchers, watcher_lags
from services.api.watch.event_consumer import TIMEOUT
from services.api.watch.folded_offsets import FoldedOffsets
from services.api.watch.live_reader import JoinPoint, LiveReader
from services.api.watch.lookup import KnownTasks
from services.api.watch.messages import WatchMessage
from services.api.watch.subscribers import Subscriber
from services.api.watch.watchers import Watcher, WatchSelection
from services.common.config import Settings
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["MAX_WATCHERS", "WatchService"]

log = structlog.get_logger(__name__)

MAX_WATCHERS = 1000
"""Streams of one replica. Further ones get RESOURCE_EXHAUSTED."""

_MAX_CATCH_UPS = 8

Write = Callable[[bytes], Awaitable[None]]


class WatchService:
    """Runs all Watch streams of a replica. They share one live reader, which runs while there are any."""

    def __init__(self, settings: Settings, threads: DatabaseThreads, keys: TokenKeys) -> None:
        self._settings, self._threads, self._keys = settings, threads, keys
        self._live_reader: LiveReader | None = None
        # The threads alone: a reader's memory is freed once nobody watches, before its thread ends.
        self._ending_threads: set[Thread] = set()
        self._folded_offsets = FoldedOffsets(settings)
        self._watchers: set[Watcher] = set()
        self._catch_up_groups = CatchUpGroups(
            CatchUpSlots(_MAX_CATCH_UPS, _MAX_CATCH_UPS // 2), self._make_catch_up
        )
        # Twice as many, because a consumer that closes occupies a thread too.
        self._executor = ThreadPoolExecutor(2 * _MAX_CATCH_UPS, thread_name_prefix="catchup")

    async def watch(self, tenant: str, request: pb.WatchRequest, write: Write) -> None:
        """Write a stream's messages until it ends. Raises StatusError."""
        selection = _selection(tenant, request)
        token = request.resume_token
        positions = resume_tokens.decode(self._keys, token, selection.digest()) if token else None
        if len(self._watchers) >= MAX_WATCHERS:
            raise too_many_watchers()
        try:
            async with asyncio.timeout(None) as scope:
                watcher = Watcher(selection, scope)
                stream = _WatchStream(selection, write, self._keys)
                live_reader = self._acquire_live_reader()
                self._watchers.add(watcher)
                WATCHERS.set(len(self._watchers))
                try:
                    await live_reader.wait_ready()
                    if positions is not None:
                        await self._resume(live_reader, watcher, stream, positions)
                    elif selection.task is not None:
                        await self._show(live_reader, watcher, stream, request.id)
                    else:
                        await stream.send_token(live_reader.join(watcher))
                    while True:
                        await stream.send(await watcher.next())
                finally:
                    live_reader.leave(watcher)
                    self._release_live_reader(live_reader)
                    self._watchers.discard(watcher)
                    WATCHERS.set(len(self._watchers))
        except TimeoutError:
            assert watcher.error is not None
            raise watcher.error from None

    def drain(self) -> None:
        """End every stream. Its client resumes at another replica with its last token."""
        for watcher in list(self._watchers):
            watcher.end(draining())

    async def close(self) -> None:
        """Wait until all threads have ended. Called after `drain`."""
        if self._live_reader is not None:
            self._live_reader.stop()
            self._ending_threads.add(self._live_reader.thread)
        for thread in self._ending_threads:
            await asyncio.to_thread(thread.join, 3 * TIMEOUT)
        await asyncio.to_thread(self._folded_offsets.close)
        self._executor.shutdown(wait=False)

    async def _show(self, live_reader: LiveReader, watcher: Watcher, stream: _WatchStream, id_: str) -> None:
        """Send the task as the database has it, then the changes that the database does not have yet."""
        tenant, task = watcher.selection.tenant, watcher.selection.task
        assert task is not None

        async def begin(catch_up: CatchUp) -> WatchMessage:
            # The offsets are read before the task, so that the task contains all changes before them.
            await catch_up.begin_at_fold(self._folded_offsets)
            found = await self._threads.run(lambda connection: lookup.snapshot(connection, tenant, task))
            if found is None:
                raise not_found(id_)
            view, stream.known_event_ids = found
            return WatchMessage(messages.task_body(view), catch_up.safe.text, "")

        await self._catch_up_groups.show(live_reader, watcher, begin, stream.send)

    async def _resume(
        self,
        live_reader: LiveReader,
        watcher: Watcher,
        stream: _WatchStream,
        positions: Mapping[TopicPartition, int],
    ) -> None:
        """Send what the watcher missed since these positions."""
        await stream.send_token(
            await self._catch_up_groups.resume(live_reader, watcher, positions, stream.send)
        )

    def _make_catch_up(self, subscribers: Sequence[Subscriber]) -> CatchUp:
        return CatchUp(self._settings, self._executor, subscribers, self._look_up)

    def _acquire_live_reader(self) -> LiveReader:
        if self._live_reader is None:
            self._live_reader = LiveReader(self._settings, self._look_up_until_answered, self._forget)
        self._live_reader.users += 1
        return self._live_reader

    def _release_live_reader(self, live_reader: LiveReader) -> None:
        live_reader.users -= 1
        if not live_reader.users:
            live_reader.stop()
            self._forget(live_reader)

    def _forget(self, live_reader: LiveReader) -> None:
        """Let the next watcher start a new live reader."""
        if self._live_reader is live_reader:
            self._live_reader = None
        self._ending_threads = {thread for thread in self._ending_threads if thread.is_alive()}
        self._ending_threads.add(live_reader.thread)

    async def _look_up(self, changes: Sequence[Change]) -> KnownTasks:
        return await self._threads.run(lambda connection: lookup.look_up(connection, changes))

    async def _look_up_until_answered(self, changes: Sequence[Change]) -> KnownTasks:
        """Do the same, and retry while the database is away. The streams wait meanwhile."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(StatusError),
            wait=wait_exponential(multiplier=0.1, max=2.0),
            before_sleep=_log_waiting,
            sleep=asyncio.sleep,
        )
        known: KnownTasks = await attempts(self._look_up, changes)
        return known


class _WatchStream:
    """Writes to one client. `known_event_ids` are the changes that the task it received first contains."""

    def __init__(self, selection: WatchSelection, write: Write, keys: TokenKeys) -> None:
        self._digest, self._write, self._keys = selection.digest(), write, keys
        self._positions_text: str | None = None
        self._token_part = b""
        self.known_event_ids: Collection[str] = ()

    async def send_token(self, join_point: JoinPoint) -> None:
        """Send a message that has only a token."""
        await self.send(WatchMessage(b"", join_point.text, ""))

    async def send(self, message: WatchMessage) -> None:
        """Send a message, unless the client knows its change.

        Raises StatusError RESOURCE_EXHAUSTED where the client does not read it in 20 s.
        """
        if message.event_id in self.known_event_ids:
            return
        if message.positions_text != self._positions_text:
            # Consecutive messages often have the same positions, and a MAC takes 2 us.
            token = resume_tokens.token(self._keys, self._digest, message.positions_text)
            self._positions_text, self._token_part = message.positions_text, messages.token_part(token)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await self._write(message.body + self._token_part)
        except TimeoutError:
            raise watcher_lags() from None
        WATCH_MESSAGES.inc()


def _selection(tenant: str, request: pb.WatchRequest) -> WatchSelection:
    violations: list[Violation] = []
    filter_ = collect(violations, filters.parse, request)
    task = collect(violations, task_id, request.id) if request.id else None
    if request.id and filter_ not in (None, Filter()):
        violations.append(Violation("id", "cannot be combined with a filter"))
    if violations or filter_ is None:
        raise InvalidArgument(violations)
    return WatchSelection(tenant, task, filter_)


def _log_waiting(state: RetryCallState) -> None:
    assert state.outcome is not None
    log.warning("watchers wait for the database", error=str(state.outcome.exception()))
