"""The live feed: one reader of the event topics for all who watch this replica, while anybody does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

import structlog
from confluent_kafka import KafkaError, KafkaException, Message

from services.api.metrics import WATCH_HELD, WATCH_SECONDS
from services.api.watch import messages, tokens
from services.api.watch.book import Book
from services.api.watch.changes import Change, Place
from services.api.watch.lookup import Known
from services.api.watch.problems import silent
from services.api.watch.topics import Topics
from services.api.watch.watchers import Index, Told, Watcher
from services.common.config import Settings
from services.common.kafka.pace import Pace

__all__ = ["Feed", "Joined"]

log = structlog.get_logger(__name__)

_MOST = 200
_TURN = 0.25
# Batches on their way to the loop; while there are so many the thread fetches no more.
_AHEAD = 4
_PACE = 0.02
# For a watcher for whom more messages wait, and who takes them, the feed rests so long between two batches.
_MANY, _REST = 500, 0.05
_LOOK_EVERY = 15.0
_REMIND_EVERY = 60.0
_KBYTES = 8 << 10


class Joined(NamedTuple):
    """From where a watcher hears of everything: these positions, and what stands before them and is held."""

    positions: dict[Place, int]
    held: frozenset[tuple[Place, int]]
    text: str


class Feed:
    """Reads from where the topics end now. `lookup` asks the database; `lost` is called when it cannot go on.

    All but `thread` itself is on the event loop; it ends soon after `stop`.
    """

    def __init__(
        self,
        settings: Settings,
        lookup: Callable[[Sequence[Change]], Awaitable[Known]],
        lost: Callable[[Feed], None],
    ) -> None:
        self.users = 0
        self._settings, self._lookup, self._lost = settings, lookup, lost
        self._loop = asyncio.get_running_loop()
        self._index = Index()
        self._told: set[Watcher] = set()
        self._positions: dict[Place, int] = {}
        self._joining: Joined | None = None
        self._stands = self._loop.create_future()
        self._batches: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopping = False
        self._pump: asyncio.Task[None] | None = None
        self._reminded = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    async def stand(self) -> None:
        """Wait until it reads. Raises StatusError: Kafka does not answer."""
        await asyncio.shield(self._stands)

    def join(self, watcher: Watcher) -> Joined:
        """Put everything that is told from now on into the watcher's queue, where it is wanted.

        Raises StatusError where it has ended meanwhile.
        """
        if self._stopping:
            raise silent()
        assert self._joining is not None, "it must stand"
        self._index.add(watcher)
        return self._joining

    def here(self) -> dict[Place, int]:
        """Return how far it has come."""
        assert self._joining is not None, "it must stand"
        return self._joining.positions

    def leave(self, watcher: Watcher) -> None:
        """Forget a watcher."""
        self._index.remove(watcher)
        self._told.discard(watcher)

    def stop(self) -> None:
        """End; nothing is told any more."""
        self._stopping = True
        if self._pump is not None:
            self._pump.cancel()
        if not self._stands.done():
            self._stands.set_exception(silent())
            self._stands.exception()
        WATCH_HELD.set(0)

    # --- on the loop -------------------------------------------------------------------------

    def _begin(self, positions: dict[Place, int], began_ms: int) -> None:
        if self._stopping:
            return
        self._positions = positions
        self._book = Book(began_ms)
        self._mark()
        self._pump = self._loop.create_task(self._work())
        self._stands.set_result(None)

    def _end(self, error: BaseException) -> None:
        if self._stopping:
            return
        log.warning("the feed has ended", error=str(error))
        problem = silent()
        if not self._stands.done():
            self._stands.set_exception(problem)
            self._stands.exception()
        self.stop()
        for watcher in self._index:
            watcher.end(problem)
        self._lost(self)

    async def _work(self) -> None:
        try:
            while True:
                batch = await self._next()
                try:
                    await self._tell(batch)
                finally:
                    if batch:
                        self._room.release()
        except Exception as error:
            log.exception("unexpected")
            self._end(error)

    async def _next(self) -> list[Message]:
        """Return the next batch, an empty one when what is held is due."""
        due = self._book.due()
        if due is None:
            return await self._batches.get()
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                return await self._batches.get()
        except TimeoutError:
            return []

    async def _tell(self, batch: list[Message]) -> None:
        changes = []
        for message in batch:
            place = self._topics.place(message)
            self._positions[place] = (message.offset() or 0) + 1
            if (change := self._topics.change(message)) is not None:
                changes.append(change)
        ready = self._book.read(changes, time.monotonic())
        strangers = self._book.strangers(ready)
        known = await self._lookup(strangers) if strangers else Known({}, set())
        before = self._joining
        assert before is not None
        after = self._mark()
        last: dict[Watcher, Told] = {}
        now_ms = time.time() * 1000
        for change in ready:
            if (change.row.id, change.entry.event_id) in known.repeats:
                continue
            row = self._book.after(change, known.mails.get(change.row.id))
            WATCH_SECONDS.observe(max(0.0, now_ms - change.at_ms) / 1000)
            if row is None or not (wanting := self._index.find(row)):
                continue
            told = Told(messages.body(row, change.entry), before.text, change.entry.event_id)
            for watcher in wanting:
                # A cut within the batch begins it anew: only the last message stands behind it.
                if (waiting := last.get(watcher)) is not None:
                    watcher.put(waiting)
                last[watcher] = told
        for watcher, told in last.items():
            watcher.put(told._replace(positions=after.text))
        self._told.update(last)
        self._remind()
        await self._rest(last)

    async def _rest(self, told: Iterable[Watcher]) -> None:
        """Let those come up who can: a burst is read faster than it can be written."""
        end = time.monotonic() + _REST
        behind = {watcher: watcher.waiting for watcher in told if watcher.waiting > _MANY}
        while behind and time.monotonic() < end:
            await asyncio.sleep(_REST / 10)
            behind = {w: w.waiting for w, before in behind.items() if _MANY < w.waiting < before}

    def _mark(self) -> Joined:
        held = frozenset(self._book.held())
        WATCH_HELD.set(len(held))
        positions = dict(self._positions)
        sure = dict(positions)
        for place, offset in held:
            sure[place] = min(sure[place], offset)
        self._joining = Joined(positions, held, tokens.written(sure))
        return self._joining

    def _remind(self) -> None:
        """Give whoever has heard nothing for a while a token that is not so old."""
        if time.monotonic() - self._reminded < _REMIND_EVERY:
            return
        self._reminded = time.monotonic()
        assert self._joining is not None
        reminder = Told(b"", self._joining.text, "")
        for watcher in self._index:
            if watcher not in self._told:
                watcher.put(reminder)
        self._told.clear()

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._topics = Topics(self._settings, self._on_error, _KBYTES, ends=False)
            try:
                self._read()
            finally:
                self._topics.close()
        except Exception as error:
            self._post(self._end, error)

    def _read(self) -> None:
        topics, pace = self._topics, Pace(_PACE)
        positions = topics.ends(topics.places())
        # Taken after the ends: a task that was made later is read of from its first event.
        began_ms = int(time.time() * 1000)
        assigned = set(positions)
        topics.consumer.assign([topics.at(place, offset) for place, offset in positions.items()])
        self._post(self._begin, positions, began_ms)
        looked = time.monotonic()
        while not self._stopping:
            if not self._room.acquire(timeout=_TURN):
                continue
            batch: list[Message] = []
            while not batch and not self._stopping:
                if time.monotonic() - looked > _LOOK_EVERY:
                    self._look(assigned)
                    looked = time.monotonic()
                if wait := pace.wait(time.monotonic()):
                    time.sleep(wait)
                batch = self._good(topics.fetch(_MOST, _TURN))
            pace.note_batch(len(batch), time.monotonic(), full=len(batch) == _MOST)
            self._post(self._batches.put_nowait, batch)

    def _good(self, fetched: list[Message]) -> list[Message]:
        good = []
        for message in fetched:
            error = message.error()
            if error is None:
                good.append(message)
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                raise KafkaException(error)
        return good

    def _look(self, assigned: set[Place]) -> None:
        """Read partitions that were added meanwhile, from their start."""
        try:
            new = [place for place in self._topics.places() if place not in assigned]
        except KafkaException:
            return
        if new:
            self._topics.consumer.incremental_assign([self._topics.at(place, 0) for place in new])
            assigned.update(new)

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._post(self._end, KafkaException(error))

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        # The loop may be gone by now.
        if not self._stopping and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
