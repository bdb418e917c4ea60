"""Watchers that resume at about the same time go the way to the live feed together: it is read once for all.

Cut off together, two hundred that read alone took each other the time in which they fell further behind.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import structlog

from services.api.errors import Problem, internal
from services.api.watch.catchup import CatchUp
from services.api.watch.changes import Place
from services.api.watch.feed import Feed, Joined
from services.api.watch.members import Member
from services.api.watch.problems import gone, lagging, silent
from services.api.watch.watchers import Told, Watcher

__all__ = ["PATIENCE", "Convoys", "Traveller", "join"]

log = structlog.get_logger(__name__)

PATIENCE = 20.0
"""Seconds that a watcher may let those wait who go with it."""

# A watcher that is nearer than this many records joins the live feed; what comes meanwhile fits its queue.
_NEAR = 1000
# Who was cut off together comes back within a moment.
_GATHER = 0.05
_MOST_WAITING = 100


class Traveller(Member):
    """A member on its way; what was missed waits here until its stream takes it."""

    def __init__(self, feed: Feed, watcher: Watcher, positions: Mapping[Place, int]) -> None:
        super().__init__(watcher, positions)
        self.feed = feed
        self.joined: Joined | None = None
        self.away = False
        self.companions: set[Traveller] = set()
        self.task: asyncio.Task[None] | None = None
        self._queue: deque[Told] = deque()
        self._filled, self._room = asyncio.Event(), asyncio.Event()

    async def put(self, told: Told) -> None:
        """Queue a message. Where many wait and too few are taken in time, the watcher is ended."""
        if len(self._queue) >= _MOST_WAITING and not self.away:
            self._room.clear()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._room.wait()
            except TimeoutError:
                self.watcher.end(lagging())
                self.leave()
        self.add(told)

    def add(self, told: Told) -> None:
        """Queue a message, however many wait."""
        if not self.away:
            self._queue.append(told)
            self._filled.set()

    def arrive(self, joined: Joined) -> None:
        """Nothing more was missed."""
        self.joined = joined
        self._filled.set()

    async def missed(self) -> AsyncIterator[Told]:
        """Yield what was missed, until it has joined."""
        while self._queue or self.joined is None:
            self._filled.clear()
            if not self._queue:
                await self._filled.wait()
            while self._queue:
                yield self._queue.popleft()
                if len(self._queue) <= _MOST_WAITING // 2:
                    self._room.set()

    def lose(self) -> None:
        """End its watcher, of what it missed records are gone; the others go on."""
        self.watcher.end(gone())
        self.leave()

    def leave(self) -> None:
        """Go no further; where nobody else goes on, nothing more is read."""
        self.away = True
        self._queue.clear()
        self._room.set()
        self.companions.discard(self)
        if self.task is not None and not self.companions:
            self.task.cancel()


class Convoys:
    """Those who wait for their way and those who are on it; `slots` are ways that may be gone at a time."""

    def __init__(self, slots: asyncio.Semaphore, catch_up: Callable[[Sequence[Member]], CatchUp]) -> None:
        self._slots, self._catch_up = slots, catch_up
        self._waiting: list[Traveller] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def resume(
        self,
        feed: Feed,
        watcher: Watcher,
        positions: Mapping[Place, int],
        send: Callable[[Told], Awaitable[None]],
    ) -> Joined:
        """Send what the watcher missed since these positions; return where it joined the feed.

        What keeps it from that ends the watcher.
        """
        traveller = Traveller(feed, watcher, positions)
        self._waiting.append(traveller)
        task = asyncio.create_task(self._lead())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            async for told in traveller.missed():
                await send(told)
        finally:
            if traveller in self._waiting:
                self._waiting.remove(traveller)
            traveller.leave()
        assert traveller.joined is not None
        return traveller.joined

    async def _lead(self) -> None:
        """Take along who waits. Each who waits brings one of these, so nobody is left behind."""
        async with self._slots:
            if not self._waiting:
                return
            await asyncio.sleep(_GATHER)
            if not (group := self._group()):
                return
            task = asyncio.current_task()
            for traveller in group:
                traveller.task, traveller.companions = task, group
            try:
                await self._go(group)
            except Exception as error:
                if not isinstance(error, Problem):
                    log.exception("unexpected")
                for traveller in list(group):
                    traveller.watcher.end(error if isinstance(error, Problem) else internal())

    def _group(self) -> set[Traveller]:
        """Take out those of one feed who wait, but for such as have more than twice as far as the nearest."""
        if not self._waiting:
            return set()
        feed = self._waiting[0].feed
        here = feed.here()
        far = {t: sum(max(0, end - t.at(place)) for place, end in here.items()) for t in self._waiting}
        most = 2 * min(left for t, left in far.items() if t.feed is feed) + _NEAR
        group = {t for t, left in far.items() if t.feed is feed and left <= most}
        self._waiting = [t for t in self._waiting if t not in group]
        return group

    async def _go(self, group: set[Traveller]) -> None:
        feed = next(iter(group)).feed
        by_watcher = {traveller.watcher: traveller for traveller in group}
        async with self._catch_up(list(group)) as missed:
            for member in await missed.check(feed.here()):
                by_watcher[member.watcher].lose()

            near = False

            async def send(member: Member, told: Told | None) -> None:
                traveller = by_watcher[member.watcher]
                if told is None:
                    traveller.lose()
                    return
                # Once they hear of what comes, nobody is to wait for another: that queue fills meanwhile.
                traveller.add(told) if near else await traveller.put(told)

            def going() -> list[Watcher]:
                nonlocal near
                near = True
                return [traveller.watcher for traveller in group]

            joined = await join(feed, missed, going, send)
            for traveller in list(group):
                traveller.arrive(joined)
            # They are at their ends; none of them cancels this any more.
            group.clear()


async def join(
    feed: Feed,
    missed: CatchUp,
    going: Callable[[], list[Watcher]],
    send: Callable[[Member, Told | None], Awaitable[None]],
) -> Joined:
    """Go the way to the live feed, and let those who still go join it without a gap; return where.

    `send` gets None for a member of whose messages some are gone; it gets no more. Raises Problem.
    """
    while missed.left(here := feed.here()) > _NEAR:
        async for member, told in missed.read(here):
            await send(member, told)
    places = [feed.join(watcher) for watcher in going()]
    if not places:
        raise silent()
    joined = places[-1]
    async for member, told in missed.read(joined.positions):
        await send(member, told)
    async for member, told in missed.rest(joined.held):
        await send(member, told)
    return joined
