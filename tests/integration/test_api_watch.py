"""Watch on a real Kafka and MySQL: what is told, in which order, and that a cut loses nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]
from google.rpc import error_details_pb2, status_pb2

from postroad.v1 import events_pb2 as ev
from postroad.v1 import task_pb2
from postroad.v1.task_service_pb2 import CancelRequest, CreateRequest, TaskData, WatchRequest, WatchResponse
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import uuid7
from services.api.database_threads import DatabaseThreads
from services.api.watch.changes import Place
from services.api.watch.feed import Feed
from services.api.watch.folded import Folded
from services.api.watch.topics import Topics
from services.api.watch.watching import Watches
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.events import Event, encode
from services.common.fold import delta
from services.common.kafka.clients import consumer_config
from services.common.kafka.topics import EVENT_TOPICS
from services.common.timeline import timeline_entry
from tests.api_process import ApiProcess, Installation, eventually
from tests.forms import LONG, by_form
from tests.groups import describe
from tests.stack import Infra

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...] | None
HELD = "postroad_api_watch_held_changes"


def now_us() -> int:
    return time.time_ns() // 1000


class Telling:
    """The stages' part: puts events on their topics, and folds them where that is asked for."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._producer = Producer({"bootstrap.servers": installation.infra.bootstrap, "linger.ms": 0})
        self.engine = make_engine(installation.database_url)

    def tell(self, *events: Event, fold: bool = True, header: tuple[str, bytes] | None = None) -> None:
        """Publish, and return when all are acked. All have one time, however long this takes."""
        at = time.time_ns() // 1_000_000
        for event in events:
            record = encode(event, "test")
            topic = self._installation.prefix + record.topic
            headers = [*record.headers, *([header] if header else [])]
            while True:
                try:
                    self._producer.produce(topic, record.value, record.key, headers=headers, timestamp=at)  # type: ignore[arg-type]
                    break
                except BufferError:
                    self._producer.poll(0.1)
        assert self._producer.flush(30) == 0
        if fold:
            self.fold(*events)

    def fold(self, *events: Event) -> None:
        transaction(self.engine, lambda connection: taskstore.upsert(connection, map(delta, events)))
        transaction(
            self.engine, lambda connection: taskstore.insert_events(connection, map(timeline_entry, events))
        )


@pytest.fixture
def installation(infra: Infra) -> Installation:
    return Installation(infra)


@pytest.fixture
def stages(installation: Installation) -> Iterator[Telling]:
    telling = Telling(installation)
    yield telling
    telling.engine.dispose()


class Stream:
    """A Watch whose messages are taken as they come."""

    def __init__(self, api: ApiProcess, token: str = "", metadata: Metadata = None, **asked: object) -> None:
        self.channel = grpc.insecure_channel(api.target, [("grpc.use_local_subchannel_pool", 1)])
        request = WatchRequest(resume_token=token, **asked)  # type: ignore[arg-type]
        self.call = TaskServiceStub(self.channel).Watch(request, metadata=metadata)
        self.messages: list[WatchResponse] = []
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            for message in self.call:
                self.messages.append(message)
        except grpc.RpcError as error:
            self.error = error

    def __enter__(self) -> Stream:
        eventually(lambda: self.messages or self.error)
        assert self.error is None, self.error
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """End it from the client's side."""
        self.call.cancel()
        self._thread.join(10)
        self.channel.close()

    def ended(self, seconds: float = 20) -> grpc.RpcError:
        """Return how it ended."""
        error = eventually(lambda: self.error, seconds)
        assert isinstance(error, grpc.RpcError)
        return error

    @property
    def token(self) -> str:
        """The last one."""
        return str(self.messages[-1].resume_token)

    def told(self) -> list[tuple[str, str]]:
        """The kind of each change and the status that it led to."""
        return [(m.change.kind, m.task.status) for m in list(self.messages) if m.HasField("change")]

    def has(self, count: int, seconds: float = 20) -> list[tuple[str, str]]:
        """Wait for so many changes."""
        eventually(lambda: len(self.told()) >= count or self.error, seconds)
        assert self.error is None, self.error
        return self.told()


def create(api: ApiProcess, metadata: Metadata = None, **labels: str) -> task_pb2.Task:
    data = TaskData(email="ada@shop.test", subject="s", body="text" * 100, labels=labels)
    with grpc.insecure_channel(api.target) as channel:
        task: task_pb2.Task = TaskServiceStub(channel).Create(
            CreateRequest(data=data), timeout=20, metadata=metadata
        )
    return task


def mail(task: task_pb2.Task, tenant: str = "default") -> ev.MailTask:
    return ev.MailTask(
        id=uuid7.parse(task.id),
        tenant=tenant,
        email=task.email,
        domain="shop.test",
        subject=task.subject,
        body="text",
        labels=task.labels,
        created_at_us=task.created_at.ToMicroseconds(),
    )


def ok(task: task_pb2.Task, attempt: int = 1, tenant: str = "default") -> ev.MxOk:
    hosts = [ev.MailHost(preference=10, name="mx.shop.test")]
    return ev.MxOk(task=mail(task, tenant), attempt=attempt, hosts=hosts, at_us=now_us())


def deferred(task: task_pb2.Task, attempt: int) -> ev.MailDeferred:
    id_ = uuid7.parse(task.id)
    return ev.MailDeferred(
        id=id_, attempt=attempt, stage="sender", reason="deferred", reply="451 later", at_us=now_us()
    )


def sent(task: task_pb2.Task, attempt: int = 1) -> ev.MailSent:
    id_ = uuid7.parse(task.id)
    return ev.MailSent(
        id=id_, attempt=attempt, message_id="<m@x>", relay="r:25", reply="250 ok", at_us=now_us()
    )


LIFE = [("created", "pending"), ("mx_ok", "processing"), ("sent", "completed")]


def test_one_task_its_state_first_and_its_changes_then(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api:
        task = create(api)
        with Stream(api, id=task.id) as watch:
            assert not watch.messages[0].HasField("change")
            assert watch.messages[0].task == task
            stages.tell(ok(task))
            stages.tell(sent(task))
            assert watch.has(2) == LIFE[1:]
            last = watch.messages[-1]
            assert last.task.reply == "250 ok"
            assert last.task.attempts == 1
            assert last.task.created_at == task.created_at
            assert (last.change.stage, last.change.relay, last.change.detail) == ("sender", "r:25", "<m@x>")
        with Stream(api, id=task.id) as again:
            assert again.messages[0].task == last.task


def test_a_filter_begins_with_a_token_and_tells_what_it_takes(
    installation: Installation, stages: Telling
) -> None:
    with (
        ApiProcess(installation) as api,
        Stream(api, labels={"list": "news"}, domain="shop.test") as news,
        Stream(api, status=["completed"]) as done,
        Stream(api, email="nobody@shop.test") as nobody,
    ):
        for watch in (news, done, nobody):
            assert watch.messages[0].resume_token
            assert not watch.messages[0].HasField("task")
        one, other = create(api, list="news", x="y"), create(api, list="bills")
        stages.tell(ok(one), ok(other), sent(one), sent(other))
        assert news.has(3) == LIFE
        assert {m.task.id for m in news.messages[1:]} == {one.id}
        assert dict(news.messages[-1].task.labels) == {"list": "news", "x": "y"}
        assert done.has(2) == LIFE[2:] * 2
        assert len(nobody.messages) == 1


def test_what_is_read_too_soon_waits_for_what_came_before(
    installation: Installation, stages: Telling
) -> None:
    with ApiProcess(installation) as api, Stream(api) as watch:
        task = create(api)
        watch.has(1)
        stages.tell(sent(task, 2))
        eventually(lambda: api.metric(HELD) == 1)
        held = watch.token
        stages.tell(deferred(task, 1))
        eventually(lambda: api.metric(HELD) == 2)
        stages.tell(ok(task))
        middle = ("deferred", "processing")
        assert watch.has(4) == [*LIFE[:2], middle, LIFE[2]]
        # A token never leads past what is held.
        with Stream(api, held) as resumed:
            assert resumed.has(3)[-3:] == [LIFE[1], middle, LIFE[2]]


def test_a_lost_predecessor_delays_and_does_not_block(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api, Stream(api) as watch:
        task = create(api)
        stages.tell(sent(task))
        assert watch.has(2) == [LIFE[0], LIFE[2]]


def test_an_event_is_told_once(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api, Stream(api) as watch:
        task, last = create(api), create(api, last="")
        first = ok(task)
        stages.tell(first, first, sent(task))
        stages.tell(ok(task), ok(last))
        watch.has(5)
        assert [m.change.kind for m in watch.messages if m.task.id == task.id] == ["created", "mx_ok", "sent"]


def test_a_replay_of_tasks_that_are_over_tells_nothing(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api:
        task = create(api)
        eventually(installation.published)
        created = ev.TaskCreated(task=mail(task), at_us=task.created_at.ToMicroseconds())
        stages.fold(created)
        stages.tell(ok(task), sent(task))
        # Nobody watched; a feed that begins now knows nothing of the task.
        with Stream(api) as watch:
            stages.tell(created, fold=False, header=("replay-id", b"r1"))
            # The validator's answer to it, later than the first.
            stages.tell(ok(task), fold=False)
            other = create(api)
            stages.tell(ok(other))
            watch.has(2)
            assert {m.task.id for m in watch.messages if m.HasField("task")} == {other.id}
            reopened = ev.TaskCreated(task=mail(task), epoch=now_us() // 1000)
            reopened.at_us = reopened.epoch * 1000
            stages.tell(reopened, header=("replay-id", b"r1"))
            assert watch.has(3)[-1] == ("retried", "pending")


def test_a_task_older_than_the_feed_is_asked_for(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api:
        task = create(api, list="news")
        stages.tell(ok(task))
        with Stream(api, labels={"list": "news"}) as watch:
            stages.tell(sent(task))
            assert watch.has(1) == LIFE[2:]
            assert watch.messages[-1].task.email == task.email


def lives(messages: Iterable[WatchResponse]) -> dict[str, list[str]]:
    """The kinds told of each task, first copies only."""
    found: dict[str, list[str]] = defaultdict(list)
    for message in messages:
        if message.HasField("change"):
            name = f"{message.change.kind}.{message.change.attempt}"
            if name not in found[message.task.id]:
                found[message.task.id].append(name)
    return dict(found)


def reached(watch: Stream, messages: int) -> bool:
    assert watch.error is None, watch.error
    return len(watch.messages) >= messages


def test_cut_at_any_moment_and_resumed_it_misses_nothing(installation: Installation, stages: Telling) -> None:
    chance = random.Random(7)
    expected = ["created.0", "mx_ok.1", "deferred.1", "sent.2"]
    tasks: list[task_pb2.Task] = []
    enough = threading.Event()

    def work(api: ApiProcess) -> None:
        while not enough.is_set():
            batch = [create(api) for _ in range(8)]
            enough.wait(0.05)
            tasks.extend(batch)
            steps: list[Sequence[Event]] = [(ok(t), deferred(t, 1), sent(t, 2)) for t in batch]
            # Within a task the topics' order is anybody's.
            stages.tell(*(event for step in steps for event in chance.sample(step, 3)))

    with ApiProcess(installation) as api, ApiProcess(installation) as other:
        with Stream(api) as start:
            token, seen = start.token, list[WatchResponse]()
        worker = threading.Thread(target=work, args=(api,))
        worker.start()
        try:
            for _ in range(by_form(8, 20)):
                with Stream(chance.choice((api, other)), token) as watch:
                    eventually(partial(reached, watch, chance.randint(1, 60)))
                # A client knows no more than what it read.
                read = watch.messages[: chance.randint(0, len(watch.messages))]
                seen += read
                token = read[-1].resume_token if read else token
        finally:
            enough.set()
            worker.join()
        with Stream(api, token) as watch:
            eventually(lambda: lives([*seen, *watch.messages]) == {task.id: expected for task in tasks}, 30)


def test_many_that_were_cut_off_together_come_back_together(
    installation: Installation, stages: Telling
) -> None:
    with ApiProcess(installation) as api:
        first = [Stream(api, labels={"n": str(n % 3)}).__enter__() for n in range(30)]
        for watch in first:
            watch.cut()
        tasks = [create(api, n=str(n % 3)) for n in range(60)]
        stages.tell(*(event for task in tasks for event in (sent(task), ok(task))), fold=False)
        tokens = [watch.token for watch in first]
        again = [Stream(api, token, labels={"n": str(n % 3)}) for n, token in enumerate(tokens)]
        # One of them goes away on its way; the others do not hear of it.
        again[7].cut()
        several = [create(api, n=str(n)) for n in range(3)]
        for number, watch in enumerate(again):
            if number == 7:
                continue
            mine = [task.id for n, task in enumerate(tasks) if n % 3 == number % 3]
            expected = {id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in mine}
            expected[several[number % 3].id] = ["created.0"]
            eventually(lambda w=watch, e=expected: w.error or lives(w.messages) == e, 60)  # type: ignore[misc]
            assert watch.error is None, watch.error
        for watch in again:
            watch.cut()


def test_from_long_ago_more_than_a_queue_holds(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api:
        with Stream(api, labels={"n": "1"}) as start:
            token = start.token
        clock = uuid7.Clock()
        ids = []
        for _ in range(4):
            events: list[Event] = []
            for number in range(1000):
                id_, us = clock.draw()
                ids.append(uuid7.text(id_))
                task = ev.MailTask(
                    id=id_, tenant="default", email="a@x.test", domain="x.test", labels={"n": str(number % 2)}
                )
                task.created_at_us = us
                events += [
                    ev.MailSent(id=id_, attempt=1, at_us=us + 2),
                    ev.MxOk(task=task, attempt=1, at_us=us + 1),
                    ev.TaskCreated(task=task, at_us=us),
                ]
            stages.tell(*events, fold=False)
        with Stream(api, token, labels={"n": "1"}) as watch:
            watch.has(6000, 60)
            assert lives(watch.messages) == {id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in ids[1::2]}


def refusal(api: ApiProcess, metadata: Metadata = None, **asked: object) -> tuple[grpc.StatusCode, list[str]]:
    with grpc.insecure_channel(api.target) as channel, pytest.raises(grpc.RpcError) as error:
        list(TaskServiceStub(channel).Watch(WatchRequest(**asked), timeout=20, metadata=metadata))  # type: ignore[arg-type]
    trailers: dict[str, bytes] = dict(error.value.trailing_metadata())  # type: ignore[arg-type]
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    fields = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return error.value.code(), fields


def test_bad_requests(installation: Installation) -> None:
    with ApiProcess(installation) as api:
        task = create(api)
        with Stream(api, id=task.id) as one, Stream(api, email="a@shop.test") as some:
            good, other = one.token, some.token
        bad = Code.INVALID_ARGUMENT, ["resume_token"]
        assert refusal(api, id=task.id, resume_token=other) == bad
        assert refusal(api, resume_token=other) == bad
        assert refusal(api, email="b@shop.test", resume_token=other) == bad
        assert refusal(api, id=create(api).id, resume_token=good) == bad
        for broken in (good[:-1], good + "A", good[:20] + "~" + good[21:], good[:12], "x", "é"):
            assert refusal(api, id=task.id, resume_token=broken) == bad
        assert refusal(api, reason="x" * (256 << 10)) == (Code.INVALID_ARGUMENT, ["request"])
        assert refusal(api, id="nonsense") == (Code.INVALID_ARGUMENT, ["id"])
        assert refusal(api, id=task.id, reason="x") == (Code.INVALID_ARGUMENT, ["id"])
        assert refusal(api, id=task.id, domain="-") == (Code.INVALID_ARGUMENT, ["domain"])
        assert refusal(api, id=uuid7.text(bytes(16))) == (Code.NOT_FOUND, [])


def test_a_scheduled_task_that_was_cancelled_stays_cancelled(
    installation: Installation, stages: Telling
) -> None:
    with ApiProcess(installation) as api, grpc.insecure_channel(api.target) as channel:
        stub = TaskServiceStub(channel)
        with Stream(api) as watch, Stream(api, status=["pending", "processing"]) as going:
            asked = CreateRequest(data=TaskData(email="ada@shop.test", subject="s", body="text"))
            asked.send_at.FromNanoseconds(time.time_ns() + 4 * 10**9)
            task = stub.Create(asked, timeout=20)
            assert stub.Cancel(CancelRequest(id=task.id), timeout=20).status == "cancelled"
            assert watch.has(1) == [("cancelled", "cancelled")]
            # It is published when its time has come, and judged.
            assert watch.has(2)[1:] == [("created", "cancelled")]
            stages.tell(ok(task), fold=False)
            assert watch.has(3)[2:] == [("mx_ok", "cancelled")]
            assert not going.told()
            with Stream(api, watch.messages[0].resume_token) as again:
                told = again.has(3)
                assert {kind for kind, _ in told} == {"cancelled", "created", "mx_ok"}
                assert told[-1][1] == "cancelled"


def test_tenants_hear_of_their_own(installation: Installation, stages: Telling) -> None:
    bearer = {name: (("authorization", f"Bearer {name}-secret"),) for name in ("red", "blue")}
    tokens = ",".join(f"{name}:{name}-secret" for name in bearer)
    with ApiProcess(installation, POSTROAD_API_TOKENS=tokens) as api:
        assert refusal(api) == (Code.UNAUTHENTICATED, [])
        with Stream(api, metadata=bearer["red"]) as red, Stream(api, metadata=bearer["blue"]) as blue:
            ours, theirs = create(api, bearer["red"]), create(api, bearer["blue"])
            stages.tell(ok(ours, tenant="red"), sent(ours), ok(theirs, tenant="blue"), sent(theirs))
            for watch, task in ((red, ours), (blue, theirs)):
                assert watch.has(3) == LIFE
                assert {m.task.id for m in watch.messages[1:]} == {task.id}
            assert refusal(api, bearer["blue"], id=ours.id) == (Code.NOT_FOUND, [])
            token = red.token
        assert refusal(api, bearer["blue"], resume_token=token) == (Code.INVALID_ARGUMENT, ["resume_token"])


def test_a_token_whose_records_are_gone(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api:
        with Stream(api) as watch:
            old = watch.token
            create(api)
            watch.has(1)
            fresh = watch.token
        admin = AdminClient({"bootstrap.servers": installation.infra.bootstrap})
        all_ = [TopicPartition(installation.prefix + name, n, -1) for name in EVENT_TOPICS for n in range(3)]
        for done in admin.delete_records(all_).values():
            done.result(20)
        assert refusal(api, resume_token=old) == (Code.OUT_OF_RANGE, [])
        with Stream(api, fresh) as watch:
            create(api)
            watch.has(1)
    # A reader that comes upon what is gone goes on where the records begin.
    topics = Topics(installation.settings(), lambda _: None, 1 << 10, ends=True)
    starts = topics.starts(topics.places())
    place = next(place for place, start in starts.items() if start)
    topics.consumer.assign([topics.at(place, 0)])

    def said() -> list[tuple[Place, int]]:
        return [(topics.place(m), error.code()) for m in topics.fetch(10, 0.2) if (error := m.error())]

    assert eventually(said) == [(place, KafkaError._AUTO_OFFSET_RESET)]
    topics.again(place, starts[place])
    assert eventually(said) == [(place, KafkaError._PARTITION_EOF)]
    topics.close()


def test_partitions_that_are_added_are_read_from_their_start(
    installation: Installation, stages: Telling
) -> None:
    with ApiProcess(installation) as api, Stream(api) as watch:
        before = watch.token
        admin = AdminClient({"bootstrap.servers": installation.infra.bootstrap})
        for done in admin.create_partitions(
            [NewPartitions(installation.prefix + n, 6) for n in EVENT_TOPICS]
        ).values():
            done.result(20)
        fresh = Telling(installation)
        tasks = [create(api) for _ in range(30)]
        fresh.tell(*(event for task in tasks for event in (ok(task), sent(task))))
        watch.has(90, 40)
        fresh.engine.dispose()
        expected = {task.id: {"created.0", "mx_ok.1", "sent.1"} for task in tasks}
        assert {id_: set(kinds) for id_, kinds in lives(watch.messages).items()} == expected
        with Stream(api, before) as resumed:
            resumed.has(90)
            assert lives(resumed.messages) == {id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in expected}


@pytest.mark.skipif(not LONG, reason="fills a queue of 20,000 messages: make test-long")
def test_who_does_not_keep_up_is_ended_and_resumes(installation: Installation, stages: Telling) -> None:
    with ApiProcess(installation) as api, Stream(api, labels={"n": "1"}) as quick:
        channel = grpc.insecure_channel(api.target, [("grpc.use_local_subchannel_pool", 1)])
        slow = TaskServiceStub(channel).Watch(WatchRequest())
        token = next(slow).resume_token
        task = create(api, n="1")
        ended = 'postroad_api_requests_total{code="RESOURCE_EXHAUSTED",rpc="Watch"}'
        attempts = 0
        while not api.metric(ended):
            assert attempts < 60_000
            several = [deferred(task, n) for n in range(attempts + 1, attempts + 2001)]
            for event in several:
                event.reply = "451 later" + " and later" * 100
            stages.tell(ok(task), *several, fold=False)
            attempts += 2000
            eventually(lambda n=attempts: quick.error or len(quick.messages) == n + 3, 60)  # type: ignore[misc]
            assert quick.error is None
        seen: list[WatchResponse] = []
        with pytest.raises(grpc.RpcError) as error:
            seen.extend(slow)
        assert error.value.code() is Code.RESOURCE_EXHAUSTED
        token = seen[-1].resume_token if seen else token
        channel.close()
        with Stream(api, token) as resumed:

            def all_there() -> bool:
                return len(lives([*seen, *resumed.messages]).get(task.id, ())) >= attempts + 2

            eventually(all_there, 60)


@pytest.mark.parametrize("slow", [False, True])
def test_a_drain_ends_the_streams_at_once(installation: Installation, stages: Telling, slow: bool) -> None:
    with ApiProcess(installation) as api:
        watches = [Stream(api).__enter__() for _ in range(5)]
        channel = grpc.insecure_channel(api.target, [("grpc.use_local_subchannel_pool", 1)])
        stuck = TaskServiceStub(channel).Watch(WatchRequest())
        next(stuck)
        if slow:
            task = create(api)
            stages.tell(*(deferred(task, n) for n in range(1, 3000)), ok(task), fold=False)
            watches[0].has(3001, 60)
        started = time.monotonic()
        assert api.stop() == 0
        took = time.monotonic() - started
        for watch in watches:
            assert watch.ended().code() is Code.UNAVAILABLE
            watch.cut()
        channel.close()
        assert took < 5
        api.start()
        eventually(api.ready, 30)


async def test_the_last_watcher_takes_with_it_what_the_feed_remembers(installation: Installation) -> None:
    watches = Watches(installation.settings(), DatabaseThreads(make_engine(installation.database_url)))
    written = asyncio.Event()

    async def write(message: bytes) -> None:
        written.set()

    stream = asyncio.create_task(watches.watch("", WatchRequest(), write))
    await asyncio.wait_for(written.wait(), 20)
    [feed] = [weakref.ref(found) for found in gc.get_objects() if isinstance(found, Feed)]
    stream.cancel()
    await asyncio.wait([stream])
    del stream
    end = time.monotonic() + 20
    while feed() is not None and time.monotonic() < end:
        gc.collect()
        await asyncio.sleep(0.1)
    assert feed() is None
    await watches.close()


def test_the_folds_positions_are_asked_for_without_joining_its_group(installation: Installation) -> None:
    settings = installation.settings()
    member = Consumer(consumer_config(settings, "status", "member", gather=False))
    topics = [installation.prefix + name for name in EVENT_TOPICS]
    member.subscribe(topics)

    def assigned() -> list[TopicPartition]:
        member.poll(0.05)
        return member.assignment()

    def group() -> object:
        found = describe(installation.infra.bootstrap, f"{installation.prefix}postroad.status")
        return found.state, [member.id for member in found.members]

    eventually(lambda: len(assigned()) == 3 * len(topics), 40)
    before = group()
    member.commit(
        offsets=[TopicPartition(topics[0], 1, 7), TopicPartition(topics[2], 0, 0)], asynchronous=False
    )
    places = [(name, number) for name in EVENT_TOPICS for number in range(3)]
    folded = Folded(settings)
    took = []
    with ThreadPoolExecutor(4) as threads:

        def ask(_: int) -> dict[Place, int]:
            started = time.monotonic()
            found = folded.positions(places)
            took.append(time.monotonic() - started)
            return found

        for found in threads.map(ask, range(20)):
            assert found == {(EVENT_TOPICS[0], 1): 7, (EVENT_TOPICS[2], 0): 0}
    assert max(took) < 1.5
    assert group() == before
    folded.close()
    with pytest.raises(KafkaException):
        folded.positions(places)
    assert group() == before
    assert len(assigned()) == 3 * len(topics)
    member.close()


def test_kafka_away(installation: Installation) -> None:
    with ApiProcess(installation, POSTROAD_KAFKA_BOOTSTRAP="127.0.0.1:1") as api:
        assert refusal(api) == (Code.UNAVAILABLE, [])
        assert refusal(api, id=create(api).id) == (Code.UNAVAILABLE, [])


@pytest.mark.parametrize("others_watch", [True, False])
def test_one_task_while_the_fold_is_behind(
    installation: Installation, stages: Telling, others_watch: bool
) -> None:
    with ApiProcess(installation) as api, Stream(api) as other:
        task = create(api)
        judged, mailed = ok(task), sent(task)
        stages.tell(judged, mailed, fold=False)
        # All is on the topics and was read, nothing is folded.
        other.has(3)
        if not others_watch:
            other.cut()
        with Stream(api, id=task.id) as watch:
            assert watch.messages[0].task.status == "pending"
            assert watch.has(2) == LIFE[1:]
            stages.fold(judged, mailed)
        with Stream(api, id=task.id) as watch:
            assert watch.messages[0].task.status == "completed"
