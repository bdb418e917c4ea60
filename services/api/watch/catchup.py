"""The way from resume tokens' positions to the live feed's: what watchers missed, in order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from confluent_kafka import KafkaError, KafkaException, Message

from services.api.watch import messages
from services.api.watch.book import Book
from services.api.watch.changes import Change, Place
from services.api.watch.folded import Folded
from services.api.watch.lookup import Known
from services.api.watch.members import Member, Members, Sure
from services.api.watch.merge import Merge
from services.api.watch.problems import silent
from services.api.watch.topics import Topics
from services.api.watch.watchers import Told
from services.common.config import Settings

__all__ = ["STRIDE", "CatchUp", "strides"]

R = TypeVar("R")

STRIDE = 32
"""Messages from one token to the next: who is cut off sooner gets no farther."""

_MOST = 500
_TURN = 0.2
_SILENCE = 15.0
_KBYTES = 1 << 10


class CatchUp:
    """Reads once what several missed of the topics, from their earliest position on. Raises StatusError.

    What blocks runs on `executor`. `sure` is what everything was handed on of so far. A context manager; the
    consumer is made when it is needed.
    """

    def __init__(
        self,
        settings: Settings,
        executor: Executor,
        members: Iterable[Member],
        lookup: Callable[[Sequence[Change]], Awaitable[Known]],
    ) -> None:
        self._settings, self._executor, self._lookup = settings, executor, lookup
        self.members = Members(members)
        self._next = self.members.earliest()
        self.sure = Sure.of(self._next)
        self._topics: Topics | None = None
        self._book: Book | None = None
        self._begun: set[Place] = set()
        self._began = 0
        # A call that was cancelled still runs on its thread; the consumer is for one at a time.
        self._lock = threading.Lock()

    async def __aenter__(self) -> CatchUp:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._executor.submit(self._locked, self._close)

    async def begin_at_the_fold(self, folded: Folded) -> None:
        """Begin where the status service is, whatever the members' positions."""
        topics = await self._asked(self._opened)
        starts = await self._asked(lambda: topics.starts(topics.places()))
        done = await self._asked(lambda: folded.positions(starts))
        self._next = {place: max(start, done.get(place, 0)) for place, start in starts.items()}
        self.sure = Sure.of(self._next)

    def left(self, ends: Mapping[Place, int]) -> int:
        """Return how many offsets there are up to these positions."""
        return sum(max(0, end - self._next.get(place, 0)) for place, end in ends.items())

    async def check(self, here: Mapping[Place, int]) -> list[Member]:
        """Leave out, and return, those for whom records are gone, or whose token is not of these topics.

        `here` is where the feed is; it may be a little behind another replica's, which gave a token.
        """
        members = list(self.members)
        behind = [place for place, end in here.items() if self._next.get(place, 0) < end]
        ahead = {place for m in members for place, at in m.positions.items() if at > here.get(place, 0)}
        if not behind and not ahead:
            return []
        topics = await self._asked(self._opened)
        unknown = ahead - set(await self._asked(topics.places)) if ahead else set()
        starts = await self._asked(lambda: topics.starts(behind))
        ends = await self._asked(lambda: topics.ends(ahead - unknown))
        lost = [member for member in members if member.lost(starts, ends, unknown)]
        for member in lost:
            self.members.remove(member)
        self._next = self.members.earliest()
        self.sure = Sure.of(self._next)
        return lost

    async def read(self, ends: Mapping[Place, int]) -> AsyncIterator[tuple[Member, Told | None]]:
        """Yield the messages of what lies before these positions, each with whom it is for.

        Where records that members have not heard of are deleted meanwhile, they get None and no more.
        """
        todo = {place for place, end in ends.items() if self._next.get(place, 0) < end}
        if not todo:
            return
        topics = await self._asked(self._opened)
        merge, open_, paused = Merge(todo), set(todo), set[Place]()
        start = [topics.at(place, self._next.get(place, 0)) for place in todo]
        await self._asked(lambda: topics.consumer.assign(start))
        heard = time.monotonic()
        while open_:
            fetched = await self._asked(lambda: topics.fetch(_MOST, _TURN))
            if fetched:
                heard = time.monotonic()
            elif time.monotonic() - heard > _SILENCE:
                raise silent()
            for message in fetched:
                if _deleted(message):
                    for lost in await self._skip(topics, topics.place(message), ends, open_, merge):
                        yield lost, None
                else:
                    self._take(topics, message, ends, open_, merge)
            if ready := merge.take():
                async for told in self._told(ready, ready[-1].at_ms / 1000, merge):
                    yield told
            ahead = merge.ahead() & open_
            if stop := [topics.at(place) for place in ahead - paused]:
                await self._asked(partial(topics.consumer.pause, stop))
            if go := [topics.at(place) for place in paused - ahead]:
                await self._asked(partial(topics.consumer.resume, go))
            paused = ahead

    async def rest(self, held: Collection[tuple[Place, int]]) -> AsyncIterator[tuple[Member, Told]]:
        """Yield what was held to the end, without what the feed holds itself and will tell."""
        if self._book is not None:
            async for told in self._told([], float("inf"), None, held):
                yield told

    def _take(
        self, topics: Topics, message: Message, ends: Mapping[Place, int], open_: set[Place], merge: Merge
    ) -> None:
        error = message.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            return
        place, offset = topics.place(message), message.offset() or 0
        if error is None and place in open_ and offset < ends[place]:
            if place not in self._begun:
                # The positions are of no one moment. After the latest of them all is read.
                self._begun.add(place)
                self._began = max(self._began, message.timestamp()[1])
            self._next[place] = offset + 1
            if self.members.concerns(message.key()) and (change := topics.change(message)) is not None:
                merge.put(change)
        # An end stands behind what is missing of the last offsets. One that comes sooner is a new leader's,
        # which has not heard yet how far all is kept; more follows.
        after = offset + 1 if error is None else offset
        if place in open_ and after >= ends[place]:
            self._next[place] = max(self._next.get(place, 0), ends[place])
            open_.discard(place)
            merge.end(place)

    async def _skip(
        self, topics: Topics, place: Place, ends: Mapping[Place, int], open_: set[Place], merge: Merge
    ) -> list[Member]:
        """Go on where the place's records begin now; leave out, and return, who has not heard so far."""
        if place not in open_:
            return []
        start = (await self._asked(lambda: topics.starts([place])))[place]
        before = self._next.get(place, 0)
        lost = [member for member in self.members if max(before, member.at(place)) < start]
        for member in lost:
            self.members.remove(member)
        self._next[place] = max(before, start)
        if self._next[place] >= ends[place]:
            open_.discard(place)
            merge.end(place)
        await self._asked(lambda: topics.again(place, self._next[place]))
        return lost

    async def _told(
        self,
        changes: list[Change],
        now: float,
        merge: Merge | None,
        besides: Collection[tuple[Place, int]] = (),
    ) -> AsyncIterator[tuple[Member, Told]]:
        if self._book is None:
            # Time is the records' own here.
            self._book = Book(self._began)
        ready = self._book.read(changes, now)
        strangers = self._book.strangers(ready)
        known = await self._lookup(strangers) if strangers else Known({}, set())
        for stride, left in strides(ready):
            # A cut within the stride begins it anew: only the last message of each stands behind it.
            waiting: dict[Member, Told] = {}
            for change in stride:
                if (change.place, change.offset) in besides:
                    continue
                if (change.row.id, change.entry.event_id) in known.repeats:
                    continue
                row = self._book.after(change, known.mails.get(change.row.id))
                if row is None or not (wanting := self.members.find(change, row)):
                    continue
                told = Told(messages.body(row, change.entry), "", change.entry.event_id)
                for member in wanting:
                    if member in waiting:
                        yield member, member.own(waiting[member], self.sure)
                    waiting[member] = told
            self.sure = self._written([*left.items(), *(merge.first().items() if merge else ()), *besides])
            for member, told in waiting.items():
                yield member, member.own(told, self.sure)

    def _written(self, untold: Iterable[tuple[Place, int]]) -> Sure:
        """Return the positions up to which everything was told, but for these and what is held."""
        sure = dict(self._next)
        for place, offset in (*untold, *(self._book.held() if self._book is not None else ())):
            sure[place] = min(sure[place], offset)
        return Sure.of(sure)

    # --- what blocks -------------------------------------------------------------------------

    async def _asked(self, function: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._locked, function)
        except (KafkaException, TimeoutError):
            raise silent() from None

    def _locked(self, function: Callable[[], R]) -> R:
        with self._lock:
            return function()

    def _opened(self) -> Topics:
        if self._topics is None:
            self._topics = Topics(self._settings, lambda _: None, _KBYTES, ends=True)
        return self._topics

    def _close(self) -> None:
        if self._topics is not None:
            self._topics.close()


def _deleted(message: Message) -> bool:
    error = message.error()
    return error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET


def strides(ready: Sequence[Change]) -> list[tuple[Sequence[Change], dict[Place, int]]]:
    """Return the changes in strides, each with the lowest offsets of what follows it."""
    left: dict[Place, int] = {}
    found: list[tuple[Sequence[Change], dict[Place, int]]] = []
    for start in reversed(range(0, len(ready), STRIDE)):
        stride = ready[start : start + STRIDE]
        found.append((stride, dict(left)))
        for change in stride:
            left[change.place] = min(change.offset, left.get(change.place, change.offset))
    return found[::-1]
