"""Watchers that resume at about the same time go the way to the live feed together: it is read once for all.

Cut off together, two hundred that read alone took each other the time in which they fell further behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

import structlog

from services.api.errors import StatusError, internal_error
from services.api.watch.catchup import CatchUp
from services.api.watch.changes import Place
from services.api.watch.feed import Feed, Joined
from services.api.watch.members import Member
from services.api.watch.problems import silent
from services.api.watch.traveller import Traveller
from services.api.watch.watchers import Told, Watcher

__all__ = ["Convoys"]

log = structlog.get_logger(__name__)

# A watcher that is nearer than this many records joins the live feed; what comes meanwhile fits its queue.
_NEAR = 1000
# Who was cut off together comes back within a moment.
_GATHER = 0.05


class Convoys:
    """Those who wait for their way and those who are on it; `slots` are ways that may be gone at a time."""

    def __init__(self, slots: asyncio.Semaphore, catch_up: Callable[[Sequence[Member]], CatchUp]) -> None:
        self._slots, self._catch_up = slots, catch_up
        self._waiting: list[Traveller] = []
        self._waiting_alone = 0
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
        traveller = Traveller(feed, watcher, positions, self._wanted)
        self._waiting.append(traveller)
        self._start(self._lead())
        return await self._sent(traveller, send)

    async def show(
        self,
        feed: Feed,
        watcher: Watcher,
        begin: Callable[[CatchUp], Awaitable[Told]],
        send: Callable[[Told], Awaitable[None]],
    ) -> Joined:
        """Send the message that `begin` returns, and what follows from where it has the catch-up begin.

        Return where the watcher joined the feed. What keeps it from that, also what `begin` raises, ends it.
        """
        traveller = Traveller(feed, watcher, {}, self._wanted)
        traveller.companions = {traveller}
        traveller.task = self._start(self._lead_alone(traveller, begin))
        return await self._sent(traveller, send)

    async def _sent(self, traveller: Traveller, send: Callable[[Told], Awaitable[None]]) -> Joined:
        """Send all that it missed, outside of its slot: a client may take its time."""
        try:
            async for told in traveller.missed():
                await send(told)
        finally:
            if traveller in self._waiting:
                self._waiting.remove(traveller)
            traveller.leave()
        assert traveller.joined is not None
        return traveller.joined

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _wanted(self) -> bool:
        """Whether anybody waits for a slot."""
        return self._slots.locked() and bool(self._waiting or self._waiting_alone)

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
            await self._guide(group)

    async def _lead_alone(self, traveller: Traveller, begin: Callable[[CatchUp], Awaitable[Told]]) -> None:
        self._waiting_alone += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting_alone -= 1
        try:
            await self._guide(traveller.companions, begin)
        finally:
            self._slots.release()

    async def _guide(
        self, group: set[Traveller], begin: Callable[[CatchUp], Awaitable[Told]] | None = None
    ) -> None:
        try:
            await self._go(group, begin)
        except Exception as error:
            if not isinstance(error, StatusError):
                log.exception("unexpected")
            for traveller in list(group):
                traveller.watcher.end(error if isinstance(error, StatusError) else internal_error())

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

    async def _go(self, group: set[Traveller], begin: Callable[[CatchUp], Awaitable[Told]] | None) -> None:
        feed = next(iter(group)).feed
        by_watcher = {traveller.watcher: traveller for traveller in group}
        async with self._catch_up(list(group)) as missed:
            if begin is not None:
                first = await begin(missed)
                for traveller in list(group):
                    traveller.add(first)
            else:
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

            joined = await _join(feed, missed, going, send)
            for traveller in list(group):
                traveller.arrive(joined)
            # They are at their ends; none of them cancels this any more.
            group.clear()


async def _join(
    feed: Feed,
    missed: CatchUp,
    going: Callable[[], list[Watcher]],
    send: Callable[[Member, Told | None], Awaitable[None]],
) -> Joined:
    """Go the way to the live feed, and let those who still go join it without a gap; return where.

    `send` gets None for a member of whose messages some are gone; it gets no more. Raises StatusError.
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
