"""Watchers that resume at about the same time catch up as one group, which reads the topics once.

A watcher that has just been shown its task catches up alone.

When 200 watchers reconnect at once and each re-reads the topics alone, they slow each other down and fall
further behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeAlias

import structlog

from services.api.errors import StatusError, internal_error
from services.api.watch.catch_up import CatchUp
from services.api.watch.catch_up_slots import CatchUpSlots
from services.api.watch.catching_up_watcher import CatchingUpWatcher
from services.api.watch.errors import kafka_unavailable
from services.api.watch.live_reader import JoinPoint, LiveReader
from services.api.watch.messages import WatchMessage
from services.api.watch.subscribers import Subscriber
from services.api.watch.watchers import Watcher
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["CatchUpGroups"]

log = structlog.get_logger(__name__)

# A watcher that is fewer records behind joins the live reader. Its queue holds what arrives meanwhile.
_NEAR = 1000
# Clients that lose their connection together reconnect within this time, in seconds.
_GATHER_TIME = 0.05

Send: TypeAlias = Callable[[WatchMessage], Awaitable[None]]
Begin: TypeAlias = Callable[[CatchUp], Awaitable[WatchMessage]]


class CatchUpGroups:
    """Forms groups of watchers of one tenant, and runs a catch-up of each in one of the `slots`."""

    def __init__(self, slots: CatchUpSlots, make_catch_up: Callable[[Sequence[Subscriber]], CatchUp]) -> None:
        self._slots, self._make_catch_up = slots, make_catch_up
        self._waiting: list[CatchingUpWatcher] = []
        self._waiting_alone = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def resume(
        self,
        live_reader: LiveReader,
        watcher: Watcher,
        positions: Mapping[TopicPartition, int],
        send: Send,
    ) -> JoinPoint:
        """Send what the watcher missed since `positions`; return where it joined the live reader.

        An error ends the watcher.
        """
        tenant = watcher.selection.tenant
        catching_up = CatchingUpWatcher(live_reader, watcher, positions, partial(self._slot_wanted, tenant))
        self._waiting.append(catching_up)
        self._start(self._run_group(tenant))
        return await self._send_missed(catching_up, send)

    async def show(self, live_reader: LiveReader, watcher: Watcher, begin: Begin, send: Send) -> JoinPoint:
        """Send the message that `begin` returns, and what follows; return where the watcher joined.

        `begin` also sets where the catch-up begins. An error, also one of `begin`, ends the watcher.
        """
        slot_wanted = partial(self._slot_wanted, watcher.selection.tenant)
        catching_up = CatchingUpWatcher(live_reader, watcher, {}, slot_wanted)
        catching_up.peers = {catching_up}
        catching_up.task = self._start(self._run_alone(catching_up, begin))
        return await self._send_missed(catching_up, send)

    async def _send_missed(self, catching_up: CatchingUpWatcher, send: Send) -> JoinPoint:
        """Send what it missed. This holds no slot, so that its client may take its time."""
        try:
            async for message in catching_up.missed():
                await send(message)
        finally:
            if catching_up in self._waiting:
                self._waiting.remove(catching_up)
            catching_up.leave()
        assert catching_up.join_point is not None
        return catching_up.join_point

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _slot_wanted(self, tenant: str) -> bool:
        """Return whether a watcher waits for a slot that this tenant could release."""
        return bool(self._waiting or self._waiting_alone) and self._slots.wanted(tenant)

    async def _run_group(self, tenant: str) -> None:
        """Catch up with a group of those who wait. Each of them starts this once, so nobody is left out."""
        async with self._slots.hold(tenant):
            if not self._waiting:
                return
            await asyncio.sleep(_GATHER_TIME)
            if not (group := self._take_group(tenant)):
                return
            task = asyncio.current_task()
            for catching_up in group:
                catching_up.task, catching_up.peers = task, group
            await self._catch_up(group)

    async def _run_alone(self, catching_up: CatchingUpWatcher, begin: Begin) -> None:
        async with AsyncExitStack() as stack:
            self._waiting_alone += 1
            try:
                await stack.enter_async_context(self._slots.hold(catching_up.watcher.selection.tenant))
            finally:
                self._waiting_alone -= 1
            await self._catch_up(catching_up.peers, begin)

    def _take_group(self, tenant: str) -> set[CatchingUpWatcher]:
        """Take a tenant's watchers of one live reader, except those that are twice as far as the nearest."""
        waiting = [
            catching_up for catching_up in self._waiting if catching_up.watcher.selection.tenant == tenant
        ]
        if not waiting:
            return set()
        live_reader = waiting[0].live_reader
        live = live_reader.positions()
        distances = {
            catching_up: sum(max(0, end - catching_up.position(partition)) for partition, end in live.items())
            for catching_up in waiting
            if catching_up.live_reader is live_reader
        }
        limit = 2 * min(distances.values()) + _NEAR
        group = {catching_up for catching_up, distance in distances.items() if distance <= limit}
        self._waiting = [catching_up for catching_up in self._waiting if catching_up not in group]
        return group

    async def _catch_up(self, group: set[CatchingUpWatcher], begin: Begin | None = None) -> None:
        """Run the group's catch-up; end its watchers where that fails."""
        try:
            await self._read_and_join(group, begin)
        except Exception as error:
            if not isinstance(error, StatusError):
                log.exception("unexpected")
            for catching_up in list(group):
                catching_up.watcher.end(error if isinstance(error, StatusError) else internal_error())

    async def _read_and_join(self, group: set[CatchingUpWatcher], begin: Begin | None) -> None:
        live_reader = next(iter(group)).live_reader
        by_watcher = {catching_up.watcher: catching_up for catching_up in group}
        async with self._make_catch_up(list(group)) as catch_up:
            if begin is not None:
                first = await begin(catch_up)
                for catching_up in list(group):
                    catching_up.put_nowait(first)
            else:
                for subscriber in await catch_up.remove_expired(live_reader.positions()):
                    by_watcher[subscriber.watcher].expire()

            joining = False

            async def send(subscriber: Subscriber, message: WatchMessage | None) -> None:
                catching_up = by_watcher[subscriber.watcher]
                if message is None:
                    catching_up.expire()
                elif joining:
                    # The live reader fills their queues now, so nobody may wait for another's client.
                    catching_up.put_nowait(message)
                else:
                    await catching_up.put(message)

            def joining_watchers() -> list[Watcher]:
                nonlocal joining
                joining = True
                return [catching_up.watcher for catching_up in group]

            join_point = await _join(live_reader, catch_up, joining_watchers, send)
            for catching_up in list(group):
                catching_up.joined(join_point)
            # A watcher that leaves from now on must not cancel this task.
            group.clear()


async def _join(
    live_reader: LiveReader,
    catch_up: CatchUp,
    joining_watchers: Callable[[], list[Watcher]],
    send: Callable[[Subscriber, WatchMessage | None], Awaitable[None]],
) -> JoinPoint:
    """Read up to the live reader, and let the remaining watchers join it without a gap; return where.

    `send` gets None for a subscriber that misses deleted records, and then nothing more for it. Raises
    StatusError UNAVAILABLE where Kafka does not answer.
    """
    while catch_up.distance(live := live_reader.positions()) > _NEAR:
        async for subscriber, message in catch_up.read(live):
            await send(subscriber, message)
    join_points = [live_reader.join(watcher) for watcher in joining_watchers()]
    if not join_points:
        raise kafka_unavailable()
    join_point = join_points[-1]
    async for subscriber, message in catch_up.read(join_point.positions):
        await send(subscriber, message)
    async for subscriber, message in catch_up.release_held(join_point.held):
        await send(subscriber, message)
    return join_point
