"""The pure parts of Watch: what is told when, in which order, to whom, and from where a client goes on."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import pytest
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as ev
from postroad.v1.task_pb2 import Task
from postroad.v1.task_service_pb2 import WatchRequest
from services.api.errors import InvalidArgument, StatusError
from services.api.filters import Filter
from services.api.watch import catchup, convoy, tokens, traveller, watching
from services.api.watch.book import MAYBE, SURE, Book
from services.api.watch.catchup import STRIDE, strides
from services.api.watch.changes import Change, Place, age, change
from services.api.watch.feed import Joined
from services.api.watch.lookup import Known
from services.api.watch.members import Member, Sure
from services.api.watch.merge import Merge
from services.api.watch.watchers import MOST_QUEUED, Index, Told, Wanted, Watcher
from services.common.config import Settings
from services.common.events import Event, encode, task_id
from services.common.fold import TaskRow, delta, fold
from services.common.kafka.topics import EVENT_TOPICS

MADE_MS = 1_790_000_000_000
RETRIED = MADE_MS + 500


def mail(number: int = 0) -> ev.MailTask:
    id_ = MADE_MS.to_bytes(6, "big") + number.to_bytes(10, "big")
    return ev.MailTask(
        id=id_, tenant="default", email=f"a{number}@x.test", domain="x.test", subject="s", body="b",
        labels={"list": "news", "n": str(number)}, created_at_us=MADE_MS * 1000,
    )  # fmt: skip


def life(task: ev.MailTask) -> list[Event]:
    """A task's life in the order in which it happened: deferred at each stage, failed, retried, sent."""
    id_, at = task.id, MADE_MS * 1000
    return [
        ev.TaskCreated(task=task, at_us=at),
        ev.MailDeferred(id=id_, attempt=1, stage="validator", at_us=at + 1),
        ev.MxOk(task=task, attempt=2, at_us=at + 2),
        ev.MailDeferred(id=id_, attempt=1, stage="sender", in_doubt=True, at_us=at + 3),
        ev.MailDeferred(id=id_, attempt=1, stage="sender", at_us=at + 4),
        ev.MailDeferred(id=id_, attempt=2, stage="sender", at_us=at + 5),
        ev.MailFailed(id=id_, attempt=3, at_us=at + 6),
        ev.TaskCreated(task=task, epoch=RETRIED, at_us=RETRIED * 1000),
        ev.MxOk(task=task, epoch=RETRIED, attempt=1, at_us=RETRIED * 1000 + 1),
        ev.MailSent(id=id_, epoch=RETRIED, attempt=1, at_us=RETRIED * 1000 + 2),
    ]


def read(event: Event, offset: int = 0, at_ms: int = 0, replayed: bool = False) -> Change:
    record = encode(event, "test")
    return change(record.value, replayed, (record.topic, task_id(event)[-1] % 2), offset, at_ms)


def named(changes: list[Change]) -> list[str]:
    return [c.entry.event_id for c in changes]


def split(chance: random.Random, items: list[Change]) -> list[list[Change]]:
    batches: list[list[Change]] = [[]]
    for item in items:
        if chance.random() < 0.4:
            batches.append([])
        batches[-1].append(item)
    return batches


@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_whatever_the_topics_order_each_task_is_told_in_the_order_of_its_life(
    chance: random.Random, tasks: int
) -> None:
    lives = [[read(event) for event in life(mail(number))] for number in range(tasks)]
    # Each topic in order and perhaps twice, all of them in any order.
    topics: dict[str, list[Change]] = {}
    for place in range(10):
        for one in lives:
            topics.setdefault(one[place].place[0], []).append(one[place])
    queue: list[Change] = []
    left = {name: list(changes) * chance.randint(1, 2) for name, changes in topics.items()}
    while left:
        name = chance.choice(sorted(left))
        queue.append(left[name].pop(0))
        if not left[name]:
            del left[name]
    book = Book(MADE_MS - 1)
    told = []
    for number, batch in enumerate(split(chance, queue)):
        told += book.read(batch, number * 0.001)
    assert book.due() is None
    assert not book.held()
    for one in lives:
        mine = [c for c in told if c.row.id == one[0].row.id]
        in_epochs = sorted(mine, key=lambda c: c.row.epoch)
        assert named(in_epochs) == named(one)
        first = [c for c in mine if not c.row.epoch]
        assert named(first) == named(one[:7])


@given(st.randoms(use_true_random=False))
def test_whatever_is_lost_the_rest_is_told_in_order_and_in_time(chance: random.Random) -> None:
    whole = [read(event, offset) for offset, event in enumerate(life(mail()))]
    kept = [c for c in whole if chance.random() < 0.6]
    chance.shuffle(kept)
    book = Book(MADE_MS - 1)
    told = book.read(kept, 0.0)
    while (due := book.due()) is not None:
        assert due <= SURE
        told += book.read([], due)
    assert named(told) == named(sorted(kept, key=age))


def test_what_may_have_been_before_is_waited_for_shortly() -> None:
    sent = read(life(mail())[-1])
    old, new = Book(RETRIED), Book(RETRIED - 1)
    assert old.read([sent], 5.0) == new.read([sent], 5.0) == []
    assert old.due() == 5.0 + MAYBE
    assert new.due() == 5.0 + SURE
    assert old.read([], 5.0 + MAYBE) == [sent]
    assert old.held() == []
    assert new.held() == [(sent.place, sent.offset)]


def test_a_scheduled_tasks_first_events_are_sure_to_come_though_it_was_made_before() -> None:
    id_, start = mail().id, MADE_MS + 3_600_000
    now_ms = start + 30_001
    sent = read(ev.MailSent(id=id_, attempt=1, at_us=now_ms * 1000), at_ms=now_ms)
    created = read(life(mail())[0], at_ms=now_ms)
    ok = read(ev.MxOk(task=mail(), attempt=1, at_us=now_ms * 1000), at_ms=now_ms)
    book = Book(start)
    assert book.read([sent], 0.0) == []
    assert book.due() == SURE
    assert book.read([ok, created], 1.0) == [created, ok, sent]
    # What came soon after the start, or is no first attempt, may follow what was before.
    early = sent._replace(at_ms=start + 30_000)
    again = read(ev.MailSent(id=id_, attempt=2, at_us=now_ms * 1000), at_ms=now_ms)
    cancelled = read(ev.TaskCancelled(id=id_, epoch=now_ms, at_us=now_ms * 1000), at_ms=now_ms)
    for change_ in (early, again, cancelled):
        book = Book(start)
        assert book.read([change_], 0.0) == []
        assert book.due() == MAYBE


def test_what_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    book = Book(MADE_MS + 1)
    first, second = (
        read(ev.MailDeferred(id=mail().id, attempt=n, stage="sender", at_us=MADE_MS * 1000)) for n in (3, 4)
    )
    assert book.read([first], 0.0) == []
    assert book.read([], MAYBE) == [first]
    assert book.read([second], 1.0) == [second]


def test_a_task_with_very_many_events_is_held_and_told_in_no_time() -> None:
    id_ = mail().id
    several = [read(ev.MailDeferred(id=id_, attempt=n, stage="sender", at_us=n)) for n in range(2, 20_002)]
    book = Book(0)
    started = time.process_time()
    assert book.read(several, 0.0) == []
    assert book.read([], SURE) == several
    assert time.process_time() - started < 5


def test_of_what_is_forgotten_nothing_is_sure() -> None:
    book = Book(0, most=1)
    events = life(mail())
    book.read([read(events[0])], 0.0)
    book.read([read(events[0]) for events in (life(mail(1)),)], 0.0)
    assert book.read([read(events[2])], 0.0) == []
    assert book.due() == MAYBE


@pytest.mark.parametrize("start", range(10))
def test_a_task_told_in_order_looks_as_the_fold_says(start: int) -> None:
    events = life(mail())
    row: TaskRow | None = None
    for event in events[:start]:
        row = fold(row, event)
    book, mails = Book(RETRIED + 1), delta(events[0])[1:9]
    for number, event in enumerate(events[start:]):
        row = fold(row, event)
        [ready] = [*book.read([read(event)], number), *book.read([], number + MAYBE)]
        known: Any = (mails[0], None, None, *mails[3:]) if book.strangers([ready]) else None
        assert (known is None) == (number > 0 or start == 0)
        assert book.after(ready, known) == row._replace(idempotency_key=None, request_hash=None)


def test_a_change_told_late_shows_the_task_as_it_was_then() -> None:
    book = Book(0)
    created = read(life(mail())[0])
    ok = read(ev.MxOk(task=mail(), attempt=1, at_us=0))
    failed = read(ev.MailFailed(id=mail().id, attempt=1, reason="rejected", at_us=1))
    for ready in book.read([created, failed], 0.0) + book.read([], SURE):
        book.after(ready, None)
    [late] = book.read([ok], SURE)
    row = book.after(late, None)
    assert row is not None
    assert (row.status, row.reason, row.recipient) == ("processing", "", "a0@x.test")


def test_an_event_of_an_epoch_that_is_over_changes_nothing() -> None:
    # Scheduled and cancelled: the cancellation is published at once, the rest when the time has come.
    cancelled = read(ev.TaskCancelled(id=mail().id, epoch=RETRIED, at_us=RETRIED * 1000))
    created, ok = read(life(mail())[0]), read(ev.MxOk(task=mail(), attempt=1, at_us=MADE_MS * 1000))
    book = Book(0)
    told = [*book.read([cancelled], 0.0), *book.read([], SURE), *book.read([created, ok], 60.0)]
    assert named(told) == named([cancelled, created, ok])
    known: Any = delta(life(mail())[0])[1:9]
    states = [book.after(c, known if c is cancelled else None) for c in told]
    assert [row and (row.status, row.epoch, row.recipient) for row in states] == [
        ("cancelled", RETRIED, "a0@x.test")
    ] * 3


@pytest.mark.parametrize(
    "late",
    [
        ev.MxFailed(id=mail().id, attempt=1, reason="no_such_domain", at_us=9),
        ev.MailDeferred(id=mail().id, attempt=1, stage="validator", at_us=9),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_late_verdict_changes_nothing_once_the_sender_has_the_task(late: Event, together: bool) -> None:
    book = Book(0)
    created, ok = read(life(mail())[0]), read(ev.MxOk(task=mail(), attempt=1, at_us=1))
    deferred = read(ev.MailDeferred(id=mail().id, attempt=1, stage="sender", reason="greylisted", at_us=2))
    batches = [[created, ok, deferred, read(late)]] if together else [[created, ok, deferred], [read(late)]]
    told = [c for number, batch in enumerate(batches) for c in book.read(batch, number)]
    assert len(told) == 4
    states = [book.after(c, None) for c in told]
    assert "failed" not in [row and row.status for row in states]
    assert states[-1] is not None
    assert (states[-1].status, states[-1].reason) == ("processing", "greylisted")


def test_what_an_operator_found_waits_for_nothing_but_the_task() -> None:
    book, id_ = Book(0), mail().id
    events = [
        ev.MailSent(id=id_, epoch=RETRIED, attempt=1, resolved=True, at_us=1),
        ev.MailFailed(id=id_, epoch=RETRIED, attempt=1, reason="not_sent", at_us=1),
    ]
    book.read([read(life(mail())[0])], 0.0)
    assert named(book.read([read(event) for event in events], 0.0)) == named([read(e) for e in events[::-1]])


def test_nobody_hears_of_a_task_whose_tenant_is_unknown() -> None:
    book = Book(MADE_MS + 10**6)
    sent = read(life(mail())[-1])
    [ready] = [*book.read([sent], 0.0), *book.read([], 1.0)]
    assert book.strangers([ready]) == [ready]
    assert book.after(ready, None) is None
    assert book.strangers([ready]) == [ready]


def test_the_database_is_asked_only_of_tasks_that_did_not_begin_here() -> None:
    book = Book(MADE_MS + 10**6)
    one, other = ([read(event) for event in life(mail(number))[:3]] for number in range(2))
    assert book.strangers([*one, *other[1:]]) == other[1:]
    replayed = one[0]._replace(replayed=True)
    assert book.strangers([replayed, one[1]]) == [replayed, one[1]]


def test_a_replay_that_reopens_a_task_is_news() -> None:
    created, reopened = life(mail())[0], life(mail())[7]
    assert read(created, replayed=True).replayed
    assert not read(reopened, replayed=True).replayed


# --- tokens ------------------------------------------------------------------------------------

PLACES = st.dictionaries(
    st.tuples(st.sampled_from(EVENT_TOPICS), st.integers(0, 40)), st.integers(0, (1 << 63) - 1), max_size=40
)


@given(PLACES, st.binary(min_size=16, max_size=16))
def test_a_token_says_where_to_go_on(positions: dict[tuple[str, int], int], bound_to: bytes) -> None:
    found = tokens.parse(tokens.bound(bound_to) + tokens.written(positions), bound_to)
    assert {place: offset for place, offset in found.items() if offset} == {
        place: offset for place, offset in positions.items() if offset
    }
    assert found.keys() >= positions.keys()


@given(PLACES, st.data())
def test_a_token_that_was_touched_is_refused(
    positions: dict[tuple[str, int], int], data: st.DataObject
) -> None:
    good = tokens.bound(b"me") + tokens.written(positions)
    assert tokens.parse(good, b"me") is not None
    at = data.draw(st.integers(0, len(good) - 1))
    character = data.draw(st.sampled_from([c for c in "AZaz09-_~é\0" if c != good[at]]))
    for bad in (good[:at], good[:at] + character + good[at + 1 :], good + character):
        with pytest.raises(InvalidArgument):
            tokens.parse(bad, b"me")
    with pytest.raises(InvalidArgument):
        tokens.parse(good, b"you")


@given(st.text(max_size=200))
def test_no_text_breaks_the_reading_of_tokens(text: str) -> None:
    for bad in (text, tokens.bound(b"me") + text):
        with pytest.raises(InvalidArgument):
            tokens.parse(bad, b"me")


# --- merging partitions ------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_partitions_are_merged_by_time_whatever_their_pace(chance: random.Random, count: int) -> None:
    places = [(EVENT_TOPICS[0], number) for number in range(count)]
    event = life(mail())[0]
    left = {
        place: [read(event)._replace(place=place, offset=o, at_ms=at) for o, at in enumerate(times)]
        for place in places
        if (times := sorted(chance.randint(0, 9) for _ in range(chance.randint(0, 8)))) is not None
    }
    everything = [c for changes in left.values() for c in changes]
    merge, taken = Merge(places, most=6), []
    for place in [place for place in places if not left[place]]:
        merge.end(place)
        del left[place]
    while left:
        open_ = [place for place in sorted(left) if place not in merge.ahead()]
        assert open_, "somebody must be read"
        place = chance.choice(open_)
        merge.put(left[place].pop(0))
        if not left[place]:
            merge.end(place)
            del left[place]
        taken += merge.take()
        waiting = [c for c in everything if c not in taken]
        for place, offset in merge.first().items():
            assert offset == min(c.offset for c in waiting if c.place == place)
        assert len(everything) - len(taken) - sum(map(len, left.values())) <= 6 + count
    assert [c.at_ms for c in taken] == sorted(c.at_ms for c in everything)
    for place in places:
        assert [c.offset for c in taken if c.place == place] == list(
            range(sum(c.place == place for c in taken))
        )


def test_a_partition_whose_times_step_back_keeps_its_order() -> None:
    one, other = (EVENT_TOPICS[0], 0), (EVENT_TOPICS[0], 1)
    blank = read(life(mail())[0])
    merge = Merge([one, other])
    for place, offset, at in ((one, 0, 5), (one, 1, 3), (other, 0, 4)):
        merge.put(blank._replace(place=place, offset=offset, at_ms=at))
    merge.end(one)
    merge.end(other)
    assert [(c.place[1], c.offset) for c in merge.take()] == [(1, 0), (0, 0), (0, 1)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=150))
def test_a_token_within_a_batch_leads_past_nothing_that_follows(places: list[tuple[int, int]]) -> None:
    blank = read(life(mail())[0])
    ready = [blank._replace(place=(EVENT_TOPICS[0], number), offset=offset) for number, offset in places]
    told = 0
    for stride, left in strides(ready):
        assert 0 < len(stride) <= STRIDE
        assert stride == ready[told : told + len(stride)]
        told += len(stride)
        rest = ready[told:]
        assert left == {c.place: min(d.offset for d in rest if d.place == c.place) for c in rest}
    assert told == len(ready)


class Record:
    """A record of a task.created partition as the client hands it on, or the end of the partition."""

    def __init__(self, number: int, offset: int, end: bool = False, deleted: bool = False) -> None:
        self.at, self._end, self._deleted = offset, end, deleted
        self.where = (EVENT_TOPICS[0], number)
        self.task = mail(2 * offset + number)

    def error(self) -> KafkaError | None:
        if self._deleted:
            return KafkaError(KafkaError._AUTO_OFFSET_RESET)
        return KafkaError(KafkaError._PARTITION_EOF) if self._end else None

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes:
        return self.task.id

    def timestamp(self) -> tuple[int, int]:
        return 1, MADE_MS


class Topics:
    """Hands on what is on these partitions, one list a turn; `start` is the first offset that is kept."""

    def __init__(self, turns: list[list[Record]], start: int = 0) -> None:
        self._turns, self._start = turns, start
        self.consumer = self
        self.read_again: list[tuple[Place, int]] = []

    def fetch(self, most: int, wait: float) -> list[Record]:
        return self._turns.pop(0)

    def place(self, record: Record) -> tuple[str, int]:
        return record.where

    def change(self, record: Record) -> Change:
        created = ev.TaskCreated(task=record.task, at_us=MADE_MS * 1000)
        return read(created, record.at)._replace(place=record.where)

    def at(self, place: tuple[str, int], offset: int = 0) -> object:
        return place

    def assign(self, places: object) -> None:
        pass

    def starts(self, places: list[Place]) -> dict[Place, int]:
        return dict.fromkeys(places, self._start)

    def again(self, place: Place, offset: int) -> None:
        self.read_again.append((place, offset))

    def close(self) -> None:
        pass


async def test_an_end_that_comes_too_soon_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A new leader does not know for a moment how far all is kept, and says that there is no more.
    turns = [
        [Record(0, 0), Record(0, 1, end=True), Record(1, 3, end=True)],
        [Record(0, 1), Record(0, 2), Record(0, 3, end=True)],
    ]
    monkeypatch.setattr(catchup, "Topics", lambda *_, **__: Topics(turns))
    [told] = await caught_up([Filter()], [{}], {(EVENT_TOPICS[0], 0): 3, (EVENT_TOPICS[0], 1): 2})
    assert len(told) == 3
    assert not turns


async def caught_up(
    filters: list[Filter], positions: list[dict[Place, int]], ends: dict[Place, int]
) -> list[list[Any]]:
    """Return what each hears on its way to these ends, None at last where some of it is gone."""
    settings: Any = None

    async def nothing(_: object) -> Known:
        return Known({}, set())

    scope = asyncio.timeout(None)
    watchers = [Watcher(Wanted("default", None, asked), scope) for asked in filters]
    members = [Member(watcher, at) for watcher, at in zip(watchers, positions, strict=True)]
    told: dict[Watcher, list[Told | None]] = {watcher: [] for watcher in watchers}
    with ThreadPoolExecutor(1) as executor:
        async with catchup.CatchUp(settings, executor, members, nothing) as missed:
            async for member, one in missed.read(ends):
                told[member.watcher].append(one)
    return list(told.values())


async def test_several_catch_up_together_each_from_its_own_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (EVENT_TOPICS[0], 0), (EVENT_TOPICS[0], 1)
    records = [Record(n, offset) for offset in range(2, 100) for n in (0, 1)]
    monkeypatch.setattr(catchup, "Topics", lambda *_, **__: Topics([records[:150], records[150:]]))
    starts = [{one: 2, other: 90}, {one: 60, other: 2}, {one: 97, other: 96}]
    filters = [Filter(), Filter(), Filter(email="a196@x.test")]
    several = await caught_up(filters, starts, {one: 100, other: 100})
    assert [len(told) for told in several] == [98 + 10, 40 + 98, 1]
    for told, start in zip(several, starts, strict=True):
        before = start
        for message in told:
            at = tokens.parse(tokens.bound(b"") + message.positions, b"")
            # No token leads back, and none leads past what its watcher was not told.
            assert all(at[place] >= before[place] for place in start)
            before = at
        assert before == {one: 100, other: 100} | {p: 0 for p in before if p not in start}


async def test_who_takes_nothing_holds_up_those_who_go_with_it_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traveller, "PATIENCE", 0.05)
    feed: Any = None
    watcher = Watcher(Wanted("default", None, Filter()), asyncio.timeout(None))
    monkeypatch.setattr(watcher, "end", lambda problem: setattr(watcher, "problem", problem))
    slow = traveller.Traveller(feed, watcher, {}, lambda: False)
    told = 0
    while watcher.problem is None:
        await slow.put(Told(b"", "", ""))
        told += 1
    assert "too many messages" in watcher.problem.message
    assert 10 < told < 1000
    # Whoever takes them goes on.
    quick = traveller.Traveller(feed, watcher, {}, lambda: False)
    taken = asyncio.create_task(anext(quick.missed()))
    await quick.put(Told(b"1", "", ""))
    assert (await taken).body == b"1"


async def test_records_deleted_while_they_are_read_end_only_who_has_not_heard_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = (EVENT_TOPICS[0], 0), (EVENT_TOPICS[0], 1)
    topics = Topics(
        [
            [Record(1, 0), Record(0, 0, deleted=True)],
            [Record(1, 1), *(Record(0, offset) for offset in range(40, 60))],
        ],
        start=40,
    )
    monkeypatch.setattr(catchup, "Topics", lambda *_, **__: topics)
    starts: list[dict[Place, int]] = [{}, {one: 40}, {one: 50, other: 1}]
    stale, whole, ahead = await caught_up([Filter()] * 3, starts, {one: 60, other: 2})
    assert stale == [None]
    assert (len(whole), len(ahead)) == (22, 11)
    assert None not in whole + ahead
    assert topics.read_again == [(one, 40)]


class Expiring:
    """A catch-up with nothing to read; that `lost` are expired it says when it is let."""

    def __init__(self, lost: Sequence[Member], asked: asyncio.Event, answer: asyncio.Event) -> None:
        self._lost, self._asked, self._answer = lost, asked, answer

    async def __aenter__(self) -> Expiring:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def check(self, here: object) -> Sequence[Member]:
        self._asked.set()
        await self._answer.wait()
        return self._lost

    def left(self, here: object) -> int:
        return 0

    async def read(self, ends: object) -> AsyncIterator[Any]:
        for nothing in ():
            yield nothing

    rest = read


class Live:
    """A feed that anybody may join, and a database that has every task."""

    async def stand(self) -> None:
        pass

    def leave(self, watcher: Watcher) -> None:
        pass

    async def run(self, work: object) -> tuple[Task, tuple[str, ...]]:
        return Task(), ()

    def here(self) -> dict[Place, int]:
        return {}

    def join(self, watcher: Watcher) -> Joined:
        return Joined({}, frozenset(), "")


@pytest.mark.parametrize("leaves", [True, False])
async def test_an_expired_token_ends_nobody_else_though_its_client_leaves(leaves: bool) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    watchers: dict[str, Watcher] = {}

    def catch_up(members: Sequence[Member]) -> Any:
        return Expiring([m for m in members if m.watcher is watchers["stale"]], asked, answer)

    convoys = convoy.Convoys(asyncio.Semaphore(1), catch_up)
    feed: Any = Live()

    async def watch(name: str) -> Joined | StatusError | None:
        try:
            async with asyncio.timeout(None) as scope:
                watchers[name] = Watcher(Wanted("default", None, Filter()), scope)

                async def send(_: Told) -> None:
                    pass

                return await convoys.resume(feed, watchers[name], {}, send)
        except TimeoutError:
            return watchers[name].problem

    async with asyncio.timeout(5):
        streams = {name: asyncio.create_task(watch(name)) for name in ("stale", "good", "fresh")}
        await asked.wait()
        if leaves:
            streams["stale"].cancel()
            await asyncio.wait([streams["stale"]])
        answer.set()
        for name in ("good", "fresh"):
            assert await streams[name] == Joined({}, frozenset(), "")
        if not leaves:
            ended = await streams["stale"]
            assert isinstance(ended, StatusError)
            assert ended.code is grpc.StatusCode.OUT_OF_RANGE


class OutboxBacklog:
    """A catch-up: the watchers of a group miss `count` changes each, but for such as miss nothing."""

    def __init__(
        self, members: Sequence[Member], nothing_for: Collection[Watcher] = (), count: int = 5000
    ) -> None:
        self._count = count
        self._members = [member for member in members if member.watcher not in nothing_for]
        self._read = False
        self.sure = Sure.of({})

    async def __aenter__(self) -> OutboxBacklog:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def check(self, here: object) -> Sequence[Member]:
        return ()

    async def begin_at_the_fold(self, folded: object) -> None:
        pass

    def left(self, here: object) -> int:
        return 0 if self._read or not self._members else self._count * 1000

    async def read(self, ends: object) -> AsyncIterator[tuple[Member, Told]]:
        for _ in range(0 if self._read else self._count):
            for member in self._members:
                yield member, Told(b"", "", "")
            await asyncio.sleep(0)
        self._read = True

    async def rest(self, held: object) -> AsyncIterator[Any]:
        for nothing in ():
            yield nothing


async def nothing_taken(_: object) -> None:
    await asyncio.Event().wait()


async def few_taken(_: object) -> None:
    await asyncio.sleep(0.005)


async def all_taken(_: object) -> None:
    pass


Send = Callable[[Any], Awaitable[None]]


LIVE: Any = Live()


async def resumed(convoys: convoy.Convoys, watchers: set[Watcher], send: Send) -> Joined | StatusError:
    """Return where a watcher joined the feed, or what ended it."""
    try:
        async with asyncio.timeout(None) as scope:
            watcher = Watcher(Wanted("default", None, Filter()), scope)
            watchers.add(watcher)
            return await convoys.resume(LIVE, watcher, {}, send)
    except TimeoutError:
        assert watcher.problem is not None
        return watcher.problem


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seconds for real clients is a moment."""
    monkeypatch.setattr(traveller, "KEPT_WAITING", 0.1)
    monkeypatch.setattr(traveller, "_LOOK_EVERY", 0.02)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("slowly", [nothing_taken, few_taken])
async def test_watchers_that_take_little_keep_no_other_from_resuming(slowly: Send) -> None:
    slow, quick = set[Watcher](), set[Watcher]()
    convoys = convoy.Convoys(asyncio.Semaphore(8), lambda m: OutboxBacklog(m, quick))  # type: ignore[arg-type,return-value]
    async with asyncio.timeout(5):
        streams = []
        for _ in range(8):
            begun = asyncio.Event()

            async def send(told: Told, begun: asyncio.Event = begun) -> None:
                begun.set()
                await slowly(told)

            streams.append(asyncio.create_task(resumed(convoys, slow, send)))
            await begun.wait()
        assert isinstance(await resumed(convoys, quick, all_taken), Joined)
    ended = [watcher.problem for watcher in slow if watcher.problem is not None]
    assert ended
    assert {problem.code for problem in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("slowly", [nothing_taken, few_taken])
async def test_a_watcher_that_takes_little_does_not_hold_up_its_companions(slowly: Send) -> None:
    watchers = set[Watcher]()
    convoys = convoy.Convoys(asyncio.Semaphore(1), OutboxBacklog)  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        together = [resumed(convoys, watchers, send) for send in (slowly, all_taken, all_taken)]
        slow, *others = await asyncio.gather(*together)
    assert isinstance(slow, StatusError)
    assert slow.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert others == [Joined({}, frozenset(), "")] * 2


@pytest.mark.usefixtures("impatient")
async def test_companions_that_take_little_alike_go_on_together() -> None:
    convoys = convoy.Convoys(asyncio.Semaphore(1), partial(OutboxBacklog, count=200))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*(resumed(convoys, set(), few_taken) for _ in range(3)))
    assert ends == [Joined({}, frozenset(), "")] * 3


@pytest.mark.usefixtures("impatient")
async def test_who_keeps_nobody_waiting_may_take_its_time() -> None:
    feed: Any = None
    looks = asyncio.Queue[None]()

    def wanted() -> bool:
        looks.put_nowait(None)
        return False

    watcher = Watcher(Wanted("default", None, Filter()), asyncio.timeout(None))
    slow = traveller.Traveller(feed, watcher, {}, wanted)
    for _ in range(100):
        await slow.put(Told(b"", "", ""))
    putting = asyncio.create_task(slow.put(Told(b"", "", "")))
    async with asyncio.timeout(5):
        for _ in range(20):
            await looks.get()
        assert watcher.problem is None
        taking = slow.missed()
        for _ in range(101):
            await anext(taking)
    assert putting.done()


async def test_a_task_that_is_shown_to_who_takes_nothing_holds_no_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader: Any = Live()
    watches = watching.Watches(Settings(), reader)
    monkeypatch.setattr(watches, "_used", Live)
    monkeypatch.setattr(watches, "_unused", lambda _: None)
    monkeypatch.setattr(watching, "CatchUp", lambda *_: OutboxBacklog(()))
    request = WatchRequest(id=str(uuid.UUID(bytes=mail().id)))
    shown = asyncio.Event()

    async def write(_: bytes) -> None:
        shown.set()

    async with asyncio.timeout(5):
        streams = []
        for _ in range(8):
            offered = asyncio.Event()

            async def block(_: bytes, offered: asyncio.Event = offered) -> None:
                offered.set()
                await nothing_taken(_)

            streams.append(asyncio.create_task(watches.watch("default", request, block)))
            await offered.wait()
        streams.append(asyncio.create_task(watches.watch("default", request, write)))
        await shown.wait()
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)
    await watches.close()


async def test_a_watcher_whose_stream_is_over_can_be_ended() -> None:
    async with asyncio.timeout(None) as scope:
        await asyncio.sleep(0)
    watcher = Watcher(Wanted("default", None, Filter()), scope)
    for _ in range(MOST_QUEUED + 1):
        watcher.put(Told(b"", "", ""))
    assert watcher.problem is not None
    watcher.end(watcher.problem)


# --- who wants it ------------------------------------------------------------------------------


def row_of(number: int, status: str = "pending", reason: str = "") -> TaskRow:
    return delta(ev.TaskCreated(task=mail(number)))._replace(status=status, reason=reason)


WANTED = st.builds(
    Wanted,
    st.sampled_from(["default", "other"]),
    st.sampled_from([None, None, mail(0).id, mail(1).id]),
    st.builds(
        Filter,
        st.sampled_from([(), ("failed",), ("failed", "pending")]),
        st.sampled_from([None, None, "a0@x.test", "a1@x.test"]),
        st.sampled_from([None, None, "x.test", "y.test"]),
        st.sampled_from([None, None, "rejected"]),
        st.sampled_from([(), (("list", "news"),), (("list", "news"), ("n", "1")), (("list", "bills"),)]),
    ),
)


@given(st.lists(WANTED, max_size=12), st.integers(0, 1), st.sampled_from(["pending", "failed"]))
def test_the_index_finds_who_wants_it_once(several: list[Wanted], number: int, status: str) -> None:
    async def found() -> None:
        index = Index()
        watchers = [Watcher(wanted, asyncio.timeout(None)) for wanted in several]
        for watcher in watchers:
            index.add(watcher)
        row = row_of(number, status, "rejected" if status == "failed" else "")
        hits = index.find(row)
        assert len(hits) == len(set(hits))
        assert set(hits) == {watcher for watcher in watchers if watcher.wanted.takes(row)}
        assert set(index) == set(watchers)
        for watcher in watchers:
            index.remove(watcher)
        assert not index.find(row)

    asyncio.run(found())


@pytest.mark.parametrize(
    ("asked", "takes"),
    [
        (Filter(), True),
        (Filter(status=("failed",)), True),
        (Filter(status=("pending", "completed")), False),
        (Filter(email="a1@x.test"), True),
        (Filter(email="A1@x.test"), False),
        (Filter(domain="x.test", reason="rejected"), True),
        (Filter(reason="expired"), False),
        (Filter(labels=(("list", "news"), ("n", "1"))), True),
        (Filter(labels=(("list", "news"), ("n", "2"))), False),
        (Filter(labels=(("lost", ""),)), False),
    ],
)
def test_a_filter_takes_what_list_would(asked: Filter, takes: bool) -> None:
    row = row_of(1, "failed", "rejected")
    assert Wanted("default", None, asked).takes(row) is takes
    assert not Wanted("other", None, asked).takes(row)
