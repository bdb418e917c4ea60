"""The resume groups of Watch: a slow or expired watcher holds up no other."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any

import grpc
import pytest

from postroad.v1.task_pb2 import Task
from postroad.v1.task_service_pb2 import WatchRequest
from services.api.errors import StatusError
from services.api.filters import Filter
from services.api.token_keys import TokenKeys
from services.api.watch import catch_up_groups, catching_up_watcher, watch_service
from services.api.watch.catch_up_slots import CatchUpSlots
from services.api.watch.live_reader import JoinPoint
from services.api.watch.messages import WatchMessage
from services.api.watch.subscribers import SafePositions, Subscriber
from services.api.watch.watchers import MAX_QUEUED, Watcher, WatchSelection
from services.common.config import Settings
from services.common.kafka.topic_partition import TopicPartition
from tests.watch_changes import mail


class ExpiringCatchUp:
    """A catch-up with nothing to read. It reports these subscribers as expired once `answer` is set."""

    def __init__(self, expired: Sequence[Subscriber], asked: asyncio.Event, answer: asyncio.Event) -> None:
        self._expired, self._asked, self._answer = expired, asked, answer

    async def __aenter__(self) -> ExpiringCatchUp:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def remove_expired(self, live: object) -> Sequence[Subscriber]:
        self._asked.set()
        await self._answer.wait()
        return self._expired

    def distance(self, live: object) -> int:
        return 0

    async def read(self, ends: object) -> AsyncIterator[Any]:
        for nothing in ():
            yield nothing

    release_held = read


class FakeLiveReader:
    """A live reader that anyone may join, and a database that has every task."""

    async def wait_ready(self) -> None:
        pass

    def leave(self, watcher: Watcher) -> None:
        pass

    async def run(self, work: object) -> tuple[Task, tuple[str, ...]]:
        return Task(), ()

    def positions(self) -> dict[TopicPartition, int]:
        return {}

    def join(self, watcher: Watcher) -> JoinPoint:
        return JoinPoint({}, frozenset(), "")


@pytest.mark.parametrize("leaves", [True, False])
async def test_an_expired_token_ends_nobody_else_though_its_client_leaves(leaves: bool) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    watchers: dict[str, Watcher] = {}

    def make_catch_up(subscribers: Sequence[Subscriber]) -> Any:
        return ExpiringCatchUp([s for s in subscribers if s.watcher is watchers["stale"]], asked, answer)

    groups = catch_up_groups.CatchUpGroups(CatchUpSlots(1, 1), make_catch_up)
    live_reader: Any = FakeLiveReader()

    async def watch(name: str) -> JoinPoint | StatusError | None:
        try:
            async with asyncio.timeout(None) as scope:
                watchers[name] = Watcher(WatchSelection("default", None, Filter()), scope)

                async def send(_: WatchMessage) -> None:
                    pass

                return await groups.resume(live_reader, watchers[name], {}, send)
        except TimeoutError:
            return watchers[name].error

    async with asyncio.timeout(30):
        streams = {name: asyncio.create_task(watch(name)) for name in ("stale", "good", "fresh")}
        await asked.wait()
        if leaves:
            streams["stale"].cancel()
            await asyncio.wait([streams["stale"]])
        answer.set()
        for name in ("good", "fresh"):
            assert await streams[name] == JoinPoint({}, frozenset(), "")
        if not leaves:
            ended = await streams["stale"]
            assert isinstance(ended, StatusError)
            assert ended.code is grpc.StatusCode.OUT_OF_RANGE


class FakeCatchUp:
    """A catch-up in which each watcher missed `count` changes, except those of `nothing_for`."""

    def __init__(
        self, subscribers: Sequence[Subscriber], nothing_for: Collection[Watcher] = (), count: int = 5000
    ) -> None:
        self._count = count
        self._subscribers = [s for s in subscribers if s.watcher not in nothing_for]
        self._read = False
        self.safe = SafePositions.of({})

    async def __aenter__(self) -> FakeCatchUp:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def remove_expired(self, live: object) -> Sequence[Subscriber]:
        return ()

    async def begin_at_fold(self, folded: object) -> None:
        pass

    def distance(self, live: object) -> int:
        return 0 if self._read or not self._subscribers else self._count * 1000

    async def read(self, ends: object) -> AsyncIterator[tuple[Subscriber, WatchMessage]]:
        for _ in range(0 if self._read else self._count):
            for subscriber in self._subscribers:
                yield subscriber, WatchMessage(b"", "", "")
            await asyncio.sleep(0)
        self._read = True

    async def release_held(self, held: object) -> AsyncIterator[Any]:
        for nothing in ():
            yield nothing


async def read_nothing(_: object) -> None:
    await asyncio.Event().wait()


async def read_few(_: object) -> None:
    await asyncio.sleep(0.005)


async def read_all(_: object) -> None:
    pass


Send = Callable[[Any], Awaitable[None]]


LIVE: Any = FakeLiveReader()


async def resumed(
    groups: catch_up_groups.CatchUpGroups, watchers: set[Watcher], send: Send
) -> JoinPoint | StatusError:
    """Return where a watcher joined the live reader, or the error that ended it."""
    try:
        async with asyncio.timeout(None) as scope:
            watcher = Watcher(WatchSelection("default", None, Filter()), scope)
            watchers.add(watcher)
            return await groups.resume(LIVE, watcher, {}, send)
    except TimeoutError:
        assert watcher.error is not None
        return watcher.error


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times in which a client must read."""
    monkeypatch.setattr(catching_up_watcher, "BLOCKING_TIMEOUT", 0.1)
    monkeypatch.setattr(catching_up_watcher, "_CHECK_INTERVAL", 0.02)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("slowly", [read_nothing, read_few])
async def test_slow_clients_do_not_keep_others_from_resuming(slowly: Send) -> None:
    slow, quick = set[Watcher](), set[Watcher]()
    groups = catch_up_groups.CatchUpGroups(CatchUpSlots(8, 8), lambda m: FakeCatchUp(m, quick))  # type: ignore[arg-type,return-value]
    async with asyncio.timeout(30):
        streams = []
        for _ in range(8):
            begun = asyncio.Event()

            async def send(message: WatchMessage, begun: asyncio.Event = begun) -> None:
                begun.set()
                await slowly(message)

            streams.append(asyncio.create_task(resumed(groups, slow, send)))
            await begun.wait()
        assert isinstance(await resumed(groups, quick, read_all), JoinPoint)
    ended = [watcher.error for watcher in slow if watcher.error is not None]
    assert ended
    assert {error.code for error in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("slowly", [read_nothing, read_few])
async def test_a_slow_client_does_not_hold_up_its_peers(slowly: Send) -> None:
    watchers = set[Watcher]()
    groups = catch_up_groups.CatchUpGroups(CatchUpSlots(1, 1), FakeCatchUp)  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        together = [resumed(groups, watchers, send) for send in (slowly, read_all, read_all)]
        slow, *others = await asyncio.gather(*together)
    assert isinstance(slow, StatusError)
    assert slow.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert others == [JoinPoint({}, frozenset(), "")] * 2


@pytest.mark.usefixtures("impatient")
async def test_equally_slow_peers_continue_together() -> None:
    groups = catch_up_groups.CatchUpGroups(CatchUpSlots(1, 1), partial(FakeCatchUp, count=200))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*(resumed(groups, set(), read_few) for _ in range(3)))
    assert ends == [JoinPoint({}, frozenset(), "")] * 3


@pytest.mark.usefixtures("impatient")
async def test_a_slow_client_that_blocks_nobody_may_take_its_time() -> None:
    live_reader: Any = None
    checks = asyncio.Queue[None]()

    def slot_wanted() -> bool:
        checks.put_nowait(None)
        return False

    watcher = Watcher(WatchSelection("default", None, Filter()), asyncio.timeout(None))
    slow = catching_up_watcher.CatchingUpWatcher(live_reader, watcher, {}, slot_wanted)
    for _ in range(100):
        await slow.put(WatchMessage(b"", "", ""))
    putting = asyncio.create_task(slow.put(WatchMessage(b"", "", "")))
    async with asyncio.timeout(30):
        for _ in range(20):
            await checks.get()
        assert watcher.error is None
        reading = slow.missed()
        for _ in range(101):
            await anext(reading)
    assert putting.done()


async def test_a_client_that_reads_nothing_holds_no_catch_up_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: Any = FakeLiveReader()
    watches = watch_service.WatchService(Settings(), threads, TokenKeys([b"k" * 32]))
    monkeypatch.setattr(watches, "_acquire_live_reader", FakeLiveReader)
    monkeypatch.setattr(watches, "_release_live_reader", lambda _: None)
    monkeypatch.setattr(watch_service, "CatchUp", lambda *_: FakeCatchUp(()))
    request = WatchRequest(id=str(uuid.UUID(bytes=mail().id)))
    shown = asyncio.Event()

    async def write(_: bytes) -> None:
        shown.set()

    async with asyncio.timeout(30):
        streams = []
        for _ in range(8):
            offered = asyncio.Event()

            async def block(_: bytes, offered: asyncio.Event = offered) -> None:
                offered.set()
                await read_nothing(_)

            streams.append(asyncio.create_task(watches.watch("default", request, block)))
            await offered.wait()
        streams.append(asyncio.create_task(watches.watch("default", request, write)))
        await shown.wait()
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)
    await watches.close()


async def test_a_client_that_reads_nothing_is_ended_after_the_write_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catching_up_watcher, "WRITE_TIMEOUT", 0.05)
    live_reader: Any = None
    watcher = Watcher(WatchSelection("default", None, Filter()), asyncio.timeout(None))
    monkeypatch.setattr(watcher, "end", lambda error: setattr(watcher, "error", error))
    slow = catching_up_watcher.CatchingUpWatcher(live_reader, watcher, {}, lambda: False)
    queued = 0
    while watcher.error is None:
        await slow.put(WatchMessage(b"", "", ""))
        queued += 1
    assert "too many messages" in watcher.error.message
    assert 10 < queued < 1000
    # A client that reads continues.
    quick = catching_up_watcher.CatchingUpWatcher(live_reader, watcher, {}, lambda: False)
    read = asyncio.create_task(anext(quick.missed()))
    await quick.put(WatchMessage(b"1", "", ""))
    assert (await read).body == b"1"


async def test_a_watcher_whose_stream_has_ended_can_be_ended() -> None:
    async with asyncio.timeout(None) as scope:
        await asyncio.sleep(0)
    watcher = Watcher(WatchSelection("default", None, Filter()), scope)
    for _ in range(MAX_QUEUED + 1):
        watcher.put(WatchMessage(b"", "", ""))
    assert watcher.error is not None
    watcher.end(watcher.error)
