"""Watch on a real Kafka and MySQL: which messages come, in which order, and that a disconnect loses none."""

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

import confluent_kafka
import grpc
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]
from google.rpc import error_details_pb2, status_pb2

from postroad.v1 import events_pb2 as ev
from postroad.v1 import task_pb2
from postroad.v1.task_service_pb2 import CancelRequest, CreateRequest, TaskData, WatchRequest, WatchResponse
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import uuid7
from services.api.database_threads import DatabaseThreads
from services.api.token_keys import TokenKeys
from services.api.watch import topic_tail
from services.api.watch.event_consumer import EventConsumer
from services.api.watch.folded_offsets import FoldedOffsets
from services.api.watch.watch_service import WatchService
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.events import Event, encode
from services.common.fold import delta
from services.common.kafka.clients import consumer_config
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS
from services.common.timeline import timeline_row
from tests.api_process import ApiProcess, Installation, eventually
from tests.forms import LONG, by_form
from tests.groups import describe
from tests.integration.stage_kit import until
from tests.stack import Infra

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str], ...] | None
HELD = "postroad_api_watch_held_changes"


def now_us() -> int:
    return time.time_ns() // 1000


class FakeStages:
    """Plays the stages: publishes events, and folds them as the status service does."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._producer = Producer({"bootstrap.servers": installation.infra.bootstrap, "linger.ms": 0})
        self.engine = make_engine(installation.database_url)

    def publish(self, *events: Event, fold: bool = True, header: tuple[str, bytes] | None = None) -> None:
        """Publish events with one record time; return once Kafka has acknowledged all."""
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

    def all_published(self) -> bool:
        """Return whether the outbox is empty."""
        with self.engine.connect() as connection:
            return connection.exec_driver_sql("SELECT COUNT(*) FROM outbox").scalar() == 0

    def fold(self, *events: Event) -> None:
        transaction(self.engine, lambda connection: taskstore.upsert(connection, map(delta, events)))
        transaction(
            self.engine, lambda connection: taskstore.insert_events(connection, map(timeline_row, events))
        )


@pytest.fixture(scope="module")
def installation(infra: Infra) -> Installation:
    return Installation(infra, partitions=3)


@pytest.fixture(scope="module")
def stages(installation: Installation) -> Iterator[FakeStages]:
    fake = FakeStages(installation)
    yield fake
    fake.engine.dispose()


@pytest.fixture(scope="module")
def shared_api(installation: Installation) -> Iterator[ApiProcess]:
    with ApiProcess(installation) as process:
        yield process


@pytest.fixture
def api(shared_api: ApiProcess, stages: FakeStages) -> Iterator[ApiProcess]:
    """An api without watchers, whose earlier tasks are all published."""
    yield shared_api
    eventually(lambda: shared_api.metric("postroad_api_watchers") == 0)
    eventually(stages.all_published)


class Stream:
    """A Watch call. A thread reads its messages at once."""

    def __init__(self, api: ApiProcess, token: str = "", metadata: Metadata = None, **fields: object) -> None:
        self.channel = grpc.insecure_channel(api.target, [("grpc.use_local_subchannel_pool", 1)])
        request = WatchRequest(resume_token=token, **fields)  # type: ignore[arg-type]
        self.call = TaskServiceStub(self.channel).Watch(request, metadata=metadata)
        self.messages: list[WatchResponse] = []
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
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
        self.disconnect()

    def disconnect(self) -> None:
        """Cancel the call from the client's side."""
        self.call.cancel()
        self._thread.join(10)
        self.channel.close()

    def ended(self, seconds: float = 20) -> grpc.RpcError:
        """Return the error that ended the call."""
        error = eventually(lambda: self.error, seconds)
        assert isinstance(error, grpc.RpcError)
        return error

    @property
    def token(self) -> str:
        """The last message's resume token."""
        return str(self.messages[-1].resume_token)

    def changes(self) -> list[tuple[str, str]]:
        """The kind of each change, and the task's status after it."""
        return [(m.change.kind, m.task.status) for m in list(self.messages) if m.HasField("change")]

    def has(self, count: int, seconds: float = 20) -> list[tuple[str, str]]:
        """Wait for so many changes; return all."""
        eventually(lambda: len(self.changes()) >= count or self.error, seconds)
        assert self.error is None, self.error
        return self.changes()


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


STEPS = [("created", "pending"), ("mx_ok", "processing"), ("sent", "completed")]


def test_a_watch_of_one_task_begins_with_the_task_and_continues_with_its_changes(
    api: ApiProcess, stages: FakeStages
) -> None:
    task = create(api)
    with Stream(api, id=task.id) as watch:
        assert not watch.messages[0].HasField("change")
        assert watch.messages[0].task == task
        stages.publish(ok(task))
        stages.publish(sent(task))
        assert watch.has(2) == STEPS[1:]
        last = watch.messages[-1]
        assert last.task.reply == "250 ok"
        assert last.task.attempts == 1
        assert last.task.created_at == task.created_at
        assert (last.change.stage, last.change.relay, last.change.detail) == ("sender", "r:25", "<m@x>")
    with Stream(api, id=task.id) as again:
        assert again.messages[0].task == last.task


def test_a_watch_of_a_filter_begins_with_a_token_and_sends_the_selected_tasks(
    api: ApiProcess, stages: FakeStages
) -> None:
    with (
        Stream(api, labels={"list": "news"}, domain="shop.test") as news,
        Stream(api, status=["completed"]) as done,
        Stream(api, email="nobody@shop.test") as nobody,
    ):
        for watch in (news, done, nobody):
            assert watch.messages[0].resume_token
            assert not watch.messages[0].HasField("task")
        one, other = create(api, list="news", x="y"), create(api, list="bills")
        stages.publish(ok(one), ok(other), sent(one), sent(other))
        assert news.has(3) == STEPS
        assert {m.task.id for m in news.messages[1:]} == {one.id}
        assert dict(news.messages[-1].task.labels) == {"list": "news", "x": "y"}
        assert done.has(2) == STEPS[2:] * 2
        assert len(nobody.messages) == 1


def test_a_change_waits_for_its_predecessors(api: ApiProcess, stages: FakeStages) -> None:
    with Stream(api) as watch:
        task = create(api)
        watch.has(1)
        stages.publish(sent(task, 2))
        eventually(lambda: api.metric(HELD) == 1)
        held = watch.token
        stages.publish(deferred(task, 1))
        eventually(lambda: api.metric(HELD) == 2)
        stages.publish(ok(task))
        middle = ("deferred", "processing")
        assert watch.has(4) == [*STEPS[:2], middle, STEPS[2]]
        # A token never skips a held change.
        with Stream(api, held) as resumed:
            assert resumed.has(3)[-3:] == [STEPS[1], middle, STEPS[2]]


def test_a_lost_predecessor_delays_a_change_but_does_not_block_it(
    api: ApiProcess, stages: FakeStages
) -> None:
    with Stream(api) as watch:
        task = create(api)
        stages.publish(sent(task))
        assert watch.has(2) == [STEPS[0], STEPS[2]]


def test_an_event_is_sent_once(api: ApiProcess, stages: FakeStages) -> None:
    with Stream(api) as watch:
        task, last = create(api), create(api, last="")
        first = ok(task)
        stages.publish(first, first, sent(task))
        stages.publish(ok(task), ok(last))
        watch.has(5)
        assert [m.change.kind for m in watch.messages if m.task.id == task.id] == ["created", "mx_ok", "sent"]


def test_a_replay_of_finished_tasks_sends_nothing(api: ApiProcess, stages: FakeStages) -> None:
    task = create(api)
    eventually(stages.all_published)
    created = ev.TaskCreated(task=mail(task), at_us=task.created_at.ToMicroseconds())
    stages.fold(created)
    stages.publish(ok(task), sent(task))
    # Nobody watched before, so the live reader begins now and does not know the task.
    with Stream(api) as watch:
        stages.publish(created, fold=False, header=("replay-id", b"r1"))
        # The validator handles it again, and produces a later verdict.
        stages.publish(ok(task), fold=False)
        other = create(api)
        stages.publish(ok(other))
        watch.has(2)
        assert {m.task.id for m in watch.messages if m.HasField("task")} == {other.id}
        reopened = ev.TaskCreated(task=mail(task), epoch=now_us() // 1000)
        reopened.at_us = reopened.epoch * 1000
        stages.publish(reopened, header=("replay-id", b"r1"))
        assert watch.has(3)[-1] == ("retried", "pending")


def test_a_task_older_than_the_live_reader_is_read_from_the_database(
    api: ApiProcess, stages: FakeStages
) -> None:
    task = create(api, list="news")
    eventually(stages.all_published)
    stages.publish(ok(task))
    with Stream(api, labels={"list": "news"}) as watch:
        stages.publish(sent(task))
        assert watch.has(1) == STEPS[2:]
        assert watch.messages[-1].task.email == task.email


def events_by_task(messages: Iterable[WatchResponse]) -> dict[str, list[str]]:
    """The kind and attempt of each task's changes, without repetitions."""
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


def test_a_watch_that_resumes_after_any_disconnect_misses_nothing(
    api: ApiProcess, stages: FakeStages, installation: Installation
) -> None:
    chance = random.Random(7)
    # A change whose predecessor is late comes before it. On a busy machine one may be.
    expected = {"created.0", "mx_ok.1", "deferred.1", "sent.2"}
    tasks: list[task_pb2.Task] = []
    enough = threading.Event()

    def work(api: ApiProcess) -> None:
        while not enough.is_set():
            batch = [create(api) for _ in range(8)]
            enough.wait(0.1)
            tasks.extend(batch)
            steps: list[Sequence[Event]] = [(ok(t), deferred(t, 1), sent(t, 2)) for t in batch]
            # The topics interleave a task's events in any order.
            stages.publish(*(event for step in steps for event in chance.sample(step, 3)))

    with ApiProcess(installation) as other:
        with Stream(api) as start:
            token, seen = start.token, list[WatchResponse]()
        worker = threading.Thread(target=work, args=(api,))
        worker.start()
        try:
            for _ in range(by_form(6, 20)):
                with Stream(chance.choice((api, other)), token) as watch:
                    eventually(partial(reached, watch, chance.randint(1, 40)))
                # The client may have read only some of the messages.
                read = watch.messages[: chance.randint(0, len(watch.messages))]
                seen += read
                token = read[-1].resume_token if read else token
        finally:
            enough.set()
            worker.join()
        with Stream(api, token) as watch:

            def all_there() -> bool:
                found = events_by_task([*seen, *watch.messages])
                return {id_: set(kinds) for id_, kinds in found.items()} == {t.id: expected for t in tasks}

            eventually(all_there, 30)


def test_watchers_that_disconnect_together_resume_together(api: ApiProcess, stages: FakeStages) -> None:
    first = [Stream(api, labels={"n": str(n % 3)}).__enter__() for n in range(12)]
    for watch in first:
        watch.disconnect()
    tasks = [create(api, n=str(n % 3)) for n in range(30)]
    stages.publish(*(event for task in tasks for event in (sent(task), ok(task))), fold=False)
    tokens = [watch.token for watch in first]
    again = [Stream(api, token, labels={"n": str(n % 3)}) for n, token in enumerate(tokens)]
    # One of them leaves while it resumes. The others do not notice.
    again[7].disconnect()
    several = [create(api, n=str(n)) for n in range(3)]
    for number, watch in enumerate(again):
        if number == 7:
            continue
        mine = [task.id for n, task in enumerate(tasks) if n % 3 == number % 3]
        expected = {id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in mine}
        expected[several[number % 3].id] = ["created.0"]
        eventually(lambda w=watch, e=expected: w.error or events_by_task(w.messages) == e, 60)  # type: ignore[misc]
        assert watch.error is None, watch.error
    for watch in again:
        watch.disconnect()


def test_a_watch_resumes_from_further_back_than_its_queue_holds(api: ApiProcess, stages: FakeStages) -> None:
    with Stream(api, labels={"n": "1"}) as start:
        token = start.token
    generator = uuid7.IdGenerator()
    ids = []
    for _ in range(by_form(1, 8)):
        events: list[Event] = []
        for number in range(500):
            id_, us = generator.new()
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
        stages.publish(*events, fold=False)
    with Stream(api, token, labels={"n": "1"}) as watch:
        watch.has(3 * len(ids) // 2, 60)
        assert events_by_task(watch.messages) == {
            id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in ids[1::2]
        }


def refusal(
    api: ApiProcess, metadata: Metadata = None, **fields: object
) -> tuple[grpc.StatusCode, list[str]]:
    with grpc.insecure_channel(api.target) as channel, pytest.raises(grpc.RpcError) as error:
        list(TaskServiceStub(channel).Watch(WatchRequest(**fields), timeout=20, metadata=metadata))  # type: ignore[arg-type]
    trailers: dict[str, bytes] = dict(error.value.trailing_metadata())  # type: ignore[arg-type]
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    violations = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            violations += [violation.field for violation in bad.field_violations]
    return error.value.code(), violations


def test_invalid_requests_are_refused(api: ApiProcess) -> None:
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


def test_a_scheduled_task_that_was_cancelled_stays_cancelled(api: ApiProcess, stages: FakeStages) -> None:
    with grpc.insecure_channel(api.target) as channel:
        stub = TaskServiceStub(channel)
        with Stream(api) as watch, Stream(api, status=["pending", "processing"]) as unfinished:
            request = CreateRequest(data=TaskData(email="ada@shop.test", subject="s", body="text"))
            request.send_at.FromNanoseconds(time.time_ns() + 3 * 10**9)
            task = stub.Create(request, timeout=20)
            assert stub.Cancel(CancelRequest(id=task.id), timeout=20).status == "cancelled"
            assert watch.has(1) == [("cancelled", "cancelled")]
            # The api publishes it when it is due, and the validator finds a verdict.
            assert watch.has(2)[1:] == [("created", "cancelled")]
            stages.publish(ok(task), fold=False)
            assert watch.has(3)[2:] == [("mx_ok", "cancelled")]
            assert not unfinished.changes()
            with Stream(api, watch.messages[0].resume_token) as again:
                changes = again.has(3)
                assert {kind for kind, _ in changes} == {"cancelled", "created", "mx_ok"}
                assert changes[-1][1] == "cancelled"


def test_a_tenant_watches_only_its_own_tasks(installation: Installation, stages: FakeStages) -> None:
    bearer = {name: (("authorization", f"Bearer {name}-secret"),) for name in ("red", "blue")}
    tokens = ",".join(f"{name}:{name}-secret" for name in bearer)
    with ApiProcess(installation, POSTROAD_API_TOKENS=tokens) as api:
        assert refusal(api) == (Code.UNAUTHENTICATED, [])
        with Stream(api, metadata=bearer["red"]) as red, Stream(api, metadata=bearer["blue"]) as blue:
            ours, theirs = create(api, bearer["red"]), create(api, bearer["blue"])
            stages.publish(ok(ours, tenant="red"), sent(ours), ok(theirs, tenant="blue"), sent(theirs))
            for watch, task in ((red, ours), (blue, theirs)):
                assert watch.has(3) == STEPS
                assert {m.task.id for m in watch.messages[1:]} == {task.id}
            assert refusal(api, bearer["blue"], id=ours.id) == (Code.NOT_FOUND, [])
            token = red.token
        assert refusal(api, bearer["blue"], resume_token=token) == (Code.INVALID_ARGUMENT, ["resume_token"])


def test_a_token_whose_records_were_deleted_is_refused(api: ApiProcess, installation: Installation) -> None:
    with Stream(api) as watch:
        old = watch.token
        create(api)
        watch.has(1)
        fresh = watch.token
    admin = AdminClient({"bootstrap.servers": installation.infra.bootstrap})
    all_ = [
        confluent_kafka.TopicPartition(installation.prefix + name, n, -1)
        for name in EVENT_TOPICS
        for n in range(3)
    ]
    for done in admin.delete_records(all_).values():
        done.result(20)
    assert refusal(api, resume_token=old) == (Code.OUT_OF_RANGE, [])
    with Stream(api, fresh) as watch:
        create(api)
        watch.has(1)
    # A consumer that meets deleted records can continue where the partition begins.
    consumer = EventConsumer(installation.settings(), lambda _: None, 1 << 10, report_ends=True)
    begins = consumer.begin_offsets(consumer.partitions())
    partition = next(partition for partition, begin in begins.items() if begin)
    consumer.consumer.assign([consumer.native(partition, 0)])

    def errors() -> list[tuple[TopicPartition, int]]:
        fetched = consumer.fetch(10, 0.2)
        return [(consumer.partition_of(m), error.code()) for m in fetched if (error := m.error())]

    assert eventually(errors) == [(partition, KafkaError._AUTO_OFFSET_RESET)]
    consumer.reassign(partition, begins[partition])
    assert eventually(errors) == [(partition, KafkaError._PARTITION_EOF)]
    consumer.close()


async def test_added_partitions_are_read_from_their_beginning(
    infra: Infra, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_tail, "_DISCOVERY_INTERVAL", 0.5)
    installation = Installation(infra)
    database = make_engine(installation.database_url)
    watches = WatchService(installation.settings(), DatabaseThreads(database), TokenKeys([bytes(32)]))
    messages: list[WatchResponse] = []

    async def write(message: bytes) -> None:
        messages.append(WatchResponse.FromString(message))

    async def watch(token: str, messages_: int) -> None:
        request = WatchRequest(resume_token=token)
        stream = asyncio.create_task(watches.watch("default", request, write))
        await until(lambda: stream.done() or len(messages) >= messages_, 40)
        stream.cancel()
        await asyncio.wait([stream])

    first = asyncio.create_task(watch("", 91))
    await until(lambda: messages)
    before = messages[0].resume_token
    admin = AdminClient({"bootstrap.servers": infra.bootstrap})
    for done in admin.create_partitions(
        [NewPartitions(installation.prefix + n, 6) for n in EVENT_TOPICS]
    ).values():
        done.result(20)
    stages = FakeStages(installation)
    tasks = [
        task_pb2.Task(id=uuid7.text(uuid7.IdGenerator().new()[0]), email="a@shop.test", subject="s")
        for _ in range(30)
    ]
    events = [
        event
        for task in tasks
        for event in (ev.TaskCreated(task=mail(task), at_us=now_us()), ok(task), sent(task))
    ]
    await asyncio.to_thread(stages.publish, *events)
    await first
    expected = {task.id: {"created.0", "mx_ok.1", "sent.1"} for task in tasks}
    assert {id_: set(kinds) for id_, kinds in events_by_task(messages).items()} == expected
    messages.clear()
    await watch(before, 90)
    assert events_by_task(messages) == {id_: ["created.0", "mx_ok.1", "sent.1"] for id_ in expected}
    await watches.close()
    stages.engine.dispose()
    database.dispose()


@pytest.mark.skipif(not LONG, reason="fills a queue of 20,000 messages: make test-long")
def test_a_watcher_that_lags_is_ended_and_can_resume(api: ApiProcess, stages: FakeStages) -> None:
    with Stream(api, labels={"n": "1"}) as quick:
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
            stages.publish(ok(task), *several, fold=False)
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
                return len(events_by_task([*seen, *resumed.messages]).get(task.id, ())) >= attempts + 2

            eventually(all_there, 60)


def test_a_drain_ends_all_streams_at_once(installation: Installation, stages: FakeStages) -> None:
    with ApiProcess(installation) as api:
        watches = [Stream(api).__enter__() for _ in range(2)]
        channel = grpc.insecure_channel(api.target, [("grpc.use_local_subchannel_pool", 1)])
        stuck = TaskServiceStub(channel).Watch(WatchRequest())
        next(stuck)
        task = create(api)
        several = [deferred(task, n) for n in range(1, 500)]
        for event in several:
            event.reply = "451 later" + " and later" * 300
        stages.publish(*several, ok(task), fold=False)
        watches[0].has(501, 60)
        started = time.monotonic()
        assert api.stop() == 0
        took = time.monotonic() - started
        for watch in watches:
            assert watch.ended().code() is Code.UNAVAILABLE
            watch.disconnect()
        channel.close()
        assert took < 10


async def test_the_live_readers_memory_is_freed_after_the_last_watcher(installation: Installation) -> None:
    threads = DatabaseThreads(make_engine(installation.database_url))
    watches = WatchService(installation.settings(), threads, TokenKeys([bytes(32)]))
    written = asyncio.Event()

    async def write(message: bytes) -> None:
        written.set()

    stream = asyncio.create_task(watches.watch("", WatchRequest(), write))
    await asyncio.wait_for(written.wait(), 20)
    live_reader = watches._live_reader
    assert live_reader is not None
    reader = weakref.ref(live_reader)
    del live_reader
    stream.cancel()
    await asyncio.wait([stream])
    del stream
    end = time.monotonic() + 20
    while reader() is not None and time.monotonic() < end:
        gc.collect()
        await asyncio.sleep(0.1)
    assert reader() is None
    await watches.close()


def test_reading_the_folded_offsets_does_not_join_the_group(infra: Infra) -> None:
    installation = Installation(infra)
    settings = installation.settings()
    member = Consumer(consumer_config(settings, "status", "member", gather=False))
    topics = [installation.prefix + name for name in EVENT_TOPICS]
    member.subscribe(topics)

    def assigned() -> list[confluent_kafka.TopicPartition]:
        member.poll(0.05)
        return member.assignment()

    def group() -> object:
        found = describe(installation.infra.bootstrap, f"{installation.prefix}postroad.status")
        return found.state, [member.id for member in found.members]

    eventually(lambda: len(assigned()) == len(topics) + 2, 40)
    before = group()
    member.commit(
        offsets=[
            confluent_kafka.TopicPartition(topics[0], 1, 7),
            confluent_kafka.TopicPartition(topics[2], 0, 0),
        ],
        asynchronous=False,
    )
    bare = len(installation.prefix)
    partitions = [TopicPartition(at.topic[bare:], at.partition) for at in member.assignment()]
    folded = FoldedOffsets(settings)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: folded.read(partitions), range(20)):
            assert found == {(EVENT_TOPICS[0], 1): 7, (EVENT_TOPICS[2], 0): 0}
    assert group() == before
    folded.close()
    with pytest.raises(KafkaException):
        folded.read(partitions)
    assert group() == before
    assert len(assigned()) == len(topics) + 2
    member.close()


def test_without_kafka_watch_is_unavailable(installation: Installation) -> None:
    with (
        ApiProcess(installation, POSTROAD_KAFKA_BOOTSTRAP="127.0.0.1:1") as api,
        ThreadPoolExecutor(2) as threads,
    ):
        everything = threads.submit(refusal, api)
        assert refusal(api, id=create(api).id) == (Code.UNAVAILABLE, [])
        assert everything.result() == (Code.UNAVAILABLE, [])
        # A drain would wait for Kafka.
        api.kill()


@pytest.mark.parametrize("others_watch", [True, False])
def test_a_watch_of_one_task_needs_no_finished_fold(
    api: ApiProcess, stages: FakeStages, others_watch: bool
) -> None:
    with Stream(api) as other:
        task = create(api)
        judged, mailed = ok(task), sent(task)
        stages.publish(judged, mailed, fold=False)
        # The live reader has read all events, and nobody has folded them.
        other.has(3)
        if not others_watch:
            other.disconnect()
        with Stream(api, id=task.id) as watch:
            assert watch.messages[0].task.status == "pending"
            assert watch.has(2) == STEPS[1:]
            stages.fold(judged, mailed)
        with Stream(api, id=task.id) as watch:
            assert watch.messages[0].task.status == "completed"
