"""An accepted task is recorded once and published, whatever is killed, disconnected or away meanwhile."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from postroad.v1 import events_pb2
from postroad.v1.task_service_pb2 import CreateRequest, GetRequest, TaskData
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import outbox, outbox_sweeper, uuid7
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.fold import delta
from tests.api_process import ApiProcess, Installation, eventually, request
from tests.forms import LONG, by_form
from tests.stack import Infra

CUTS = by_form(8, 40)
CALLERS = 4


class Db:
    """The tables of an installation."""

    def __init__(self, installation: Installation) -> None:
        self.engine: Engine = make_engine(installation.database_url)

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT COUNT(*) FROM {table}")[0][0])

    def ids(self, table: str = "tasks", column: str = "id") -> set[str]:
        return {uuid7.text(bytes(row[0])) for row in self.rows(f"SELECT {column} FROM {table}")}

    def rows(self, sql: str, *parameters: object) -> list[Any]:
        return transaction(self.engine, lambda c: list(c.exec_driver_sql(sql, parameters)))

    def outbox_empty(self) -> bool:
        return self.count("outbox") == 0


@pytest.fixture
def installation(servers: Infra) -> Installation:
    return Installation(servers)


@pytest.fixture
def db(installation: Installation) -> Iterator[Db]:
    tables = Db(installation)
    yield tables
    tables.engine.dispose()


@contextmanager
def stub(api: ApiProcess) -> Iterator[Any]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
    with grpc.insecure_channel(api.target, options) as channel:
        yield TaskServiceStub(channel)


def detail(error: grpc.RpcError, kind: Any) -> Any:
    [raw] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    for packed in status_pb2.Status.FromString(raw).details:
        if packed.Is(kind.DESCRIPTOR):
            return kind.FromString(packed.value)
    raise AssertionError(f"no {kind}")


class Load:
    """Creates tasks from several threads, `rate` a second, and notes which were accepted."""

    def __init__(self, api: ApiProcess, threads: int = CALLERS, rate: float = 100.0) -> None:
        self.accepted: list[str] = []
        self.refused: list[grpc.RpcError] = []
        self.slowest = 0.0
        self._stop = threading.Event()
        self._pause = threads / rate
        self._api = api
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with stub(self._api) as tasks:
            while not self._stop.is_set():
                number += 1000
                start = time.monotonic()
                try:
                    self.accepted.append(tasks.Create(request(number), timeout=20).id)
                except grpc.RpcError as error:
                    self.refused.append(error)
                    time.sleep(0.2)
                self.slowest = max(self.slowest, time.monotonic() - start)
                self._stop.wait(self._pause)


# --- without faults ------------------------------------------------------------------------------


def test_a_task_is_published_at_once_and_leaves_the_outbox(installation: Installation, db: Db) -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with ApiProcess(installation) as api, stub(api) as tasks:
        labels, headers = {"k": 'v"', "a": "é"}, {"X-B": "2", "X-A": "1"}
        rich = request(1, "key", html="<p>é</p>", headers=headers, labels=labels)
        ids = [tasks.Create(rich, metadata=[("traceparent", given)]).id]
        ids += [tasks.Create(request(n), metadata=[("traceparent", "00-junk")]).id for n in range(2, 30)]
        ids.append(tasks.Create(CreateRequest(data=TaskData(email="a@b.test", subject="s", html=""))).id)
        eventually(lambda: len(installation.published()) >= len(ids))
        eventually(db.outbox_empty)
        found = installation.published()
        assert sorted(uuid7.text(event.task.id) for event, _ in found) == sorted(ids)
        items = [outbox.created(event.task.id) for event, _ in found]
        again = transaction(db.engine, lambda c: outbox_sweeper.events_of_rows(c, items))
        for event, headers in found:
            assert again[outbox.created(event.task.id)] == event
            assert headers["ce_type"] == b"postroad.v1.task.created"
            traced = headers["traceparent"].decode()
            first = uuid7.text(event.task.id) == ids[0]
            assert traced == given if first else traced.split("-")[1] == event.task.id.hex()
        eventually(lambda: api.metric('postroad_api_published_total{way="relay"}') == len(ids))
        assert api.metric('postroad_api_published_total{way="sweeper"}') == 0
        assert api.metric('postroad_api_requests_total{code="OK",rpc="Create"}') == len(ids)
    assert db.ids() == set(ids)


# --- idempotency ---------------------------------------------------------------------------------


def test_one_key_is_one_task_across_concurrent_calls_and_replicas(installation: Installation, db: Db) -> None:
    with ExitStack() as stack:
        replicas = [stack.enter_context(ApiProcess(installation)) for _ in range(2)]
        stubs = [stack.enter_context(stub(api)) for api in replicas]
        threads = stack.enter_context(ThreadPoolExecutor(32))
        keys = 20

        def create(n: int) -> tuple[int, str]:
            number = n % keys
            by_metadata = n % 3 == 0
            asked = request(number, "" if by_metadata else f"key {number}")
            metadata = [("idempotency-key", f"key {number}")] if by_metadata else []
            return number, stubs[n % 2].Create(asked, metadata=metadata, timeout=30).id

        answers = list(threads.map(create, range(keys * 8)))
        by_key = dict(answers)
        assert set(answers) == set(by_key.items())
        assert db.ids() == db.ids("task_bodies", "task_id") == set(by_key.values())
        eventually(db.outbox_empty)
        assert installation.published_ids() == Counter(by_key.values())


def test_a_key_reused_for_another_request_is_a_conflict_that_names_the_original(
    installation: Installation, db: Db
) -> None:
    with ApiProcess(installation) as api, stub(api) as tasks:
        first = tasks.Create(request(1, "k"))
        for other in (request(2, "k"), request(1, "k", body=""), request(1, "k", labels={"a": "b"})):
            with pytest.raises(grpc.RpcError) as caught:
                tasks.Create(other)
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            info = detail(caught.value, error_details_pb2.ErrorInfo)
            assert (info.reason, info.metadata["id"]) == ("IDEMPOTENCY_KEY_REUSED", first.id)
        with pytest.raises(grpc.RpcError) as caught:
            tasks.Create(request(1, "k"), metadata=[("idempotency-key", "other")])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # A request in another spelling is the same request, but "k " is another key.
        assert tasks.Create(request(1, "k", email="u1@SHOP.test")).id == first.id
        assert tasks.Create(request(1, "k ")).id != first.id
        assert tasks.Create(request(1, "K")).id != first.id
        assert db.count("tasks") == 3


def test_a_repeated_create_returns_the_task_as_it_is_now(installation: Installation, db: Db) -> None:
    with ApiProcess(installation) as api, stub(api) as tasks:
        first = tasks.Create(request(1, "k"))
        sent = events_pb2.MailSent(
            id=uuid7.parse(first.id),
            attempt=2,
            message_id="<m@x>",
            reply="250 ok",
            at_us=1_800_000_000 * 10**6,
        )
        transaction(db.engine, lambda c: taskstore.upsert(c, [delta(sent)]))
        again = tasks.Create(request(1, "k"))
        assert (again.id, again.status, again.attempts, again.reply) == (first.id, "completed", 2, "250 ok")
        assert again.created_at == first.created_at
        assert again.body == ""


# --- Kafka away, the api killed ------------------------------------------------------------------


@contextmanager
def kafka_away(servers: Infra) -> Iterator[None]:
    """Stop the broker within the block; in the short form freeze it, since its next start costs much."""
    if not LONG:
        with servers.frozen("kafka-1"):
            yield
        return
    servers.stop("kafka-1")
    try:
        yield
    finally:
        servers.start("kafka-1")


@pytest.mark.breaks_servers
def test_without_kafka_creates_continue_and_are_published_later(
    servers: Infra, installation: Installation, db: Db
) -> None:
    with ApiProcess(installation, POSTROAD_MAX_IN_FLIGHT="20") as api:
        with kafka_away(servers):
            with Load(api) as load:
                eventually(lambda: len(load.accepted) > 50)
                assert api.metric("postroad_api_relay_held_tasks") <= 20
            assert api.ready()
        assert not load.refused
        eventually(db.outbox_empty, 90)
        assert set(installation.published_ids()) == set(load.accepted) == db.ids()


def test_without_kafka_the_api_is_degraded_and_records_tasks(installation: Installation) -> None:
    with ApiProcess(installation, POSTROAD_KAFKA_BOOTSTRAP="127.0.0.1:9") as api, stub(api) as tasks:
        tasks.Create(request())
        eventually(lambda: "127.0.0.1:9 does not answer" in str(api.readiness()["problems"]))
        assert api.readiness()["status"] == "degraded"
        tasks.Create(request(1))
        eventually(lambda: api.metric("postroad_api_outbox_due_rows") == 2)
        assert api.metric("postroad_api_outbox_oldest_due_seconds") > 0
        api.kill()


@pytest.mark.breaks_servers
def test_a_replica_publishes_what_a_killed_one_left_behind(
    servers: Infra, installation: Installation, db: Db
) -> None:
    with ApiProcess(installation) as api, servers.frozen("kafka-1"):
        with Load(api) as load:
            eventually(lambda: len(load.accepted) > 40)
        api.kill()
    assert db.count("outbox") == len(load.accepted)
    with ApiProcess(installation) as first, ApiProcess(installation) as second:
        eventually(db.outbox_empty, 60)
        swept = sum(api.metric('postroad_api_published_total{way="sweeper"}') for api in (first, second))
        # Each row was swept by exactly one replica.
        assert swept == len(load.accepted)
    assert installation.published_ids() == Counter(load.accepted)


def test_a_drain_answers_calls_and_publishes_accepted_tasks(installation: Installation, db: Db) -> None:
    with ApiProcess(installation) as api, Load(api) as load:
        eventually(lambda: len(load.accepted) > 50)
        assert api.stop() == 0
    # gRPC itself cancels calls that arrive just as it closes.
    codes = Counter(error.code() for error in load.refused)
    assert set(codes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert codes[grpc.StatusCode.CANCELLED] <= CALLERS
    assert db.outbox_empty()
    assert set(load.accepted) <= db.ids()
    assert set(installation.published_ids()) == db.ids()


def test_a_create_that_its_client_abandons_is_recorded_and_published_or_neither(
    installation: Installation, db: Db
) -> None:
    with ApiProcess(installation) as api, stub(api) as tasks:
        tasks.Create(request())
        codes: Counter[grpc.StatusCode] = Counter()
        for n in range(60):
            try:
                tasks.Create(request(n), timeout=0.0005 + n % 10 / 2000)
            except grpc.RpcError as error:
                codes[error.code()] += 1
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert tasks.Create(request()).status == "pending"
        eventually(db.outbox_empty)
        assert set(installation.published_ids()) == db.ids()


# --- MySQL away, hanging, closing connections ----------------------------------------------------


@pytest.mark.breaks_servers
def test_without_mysql_create_is_unavailable_quickly_and_recovers_by_itself(
    servers: Infra, installation: Installation, db: Db
) -> None:
    with ApiProcess(installation) as api, stub(api) as tasks:
        with Load(api) as load:
            eventually(lambda: len(load.accepted) > 50)
            servers.stop("mysql")
            try:
                eventually(lambda: load.refused)
                for call in (
                    lambda: tasks.Create(request()),
                    lambda: tasks.Get(GetRequest(id=load.accepted[0])),
                ):
                    start = time.monotonic()
                    with pytest.raises(grpc.RpcError) as caught:
                        call()
                    assert time.monotonic() - start < 15
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert detail(caught.value, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
                eventually(lambda: not api.ready())
            finally:
                servers.start("mysql")
            before = len(load.accepted)
            eventually(lambda: len(load.accepted) > before + 50)
            eventually(api.ready)
        # While Creates arrive, the outbox is rarely empty.
        eventually(db.outbox_empty, 40)
    assert load.slowest < 15
    assert {error.code() for error in load.refused} == {grpc.StatusCode.UNAVAILABLE}
    assert set(load.accepted) <= db.ids()
    assert db.ids() == set(installation.published_ids())


@pytest.mark.breaks_servers
def test_while_mysql_hangs_few_calls_wait_and_not_for_long(
    servers: Infra, installation: Installation, db: Db
) -> None:
    with (
        ApiProcess(installation, POSTROAD_MAX_PENDING_CREATES="20") as api,
        stub(api) as tasks,
        ThreadPoolExecutor(64) as threads,
    ):
        first = tasks.Create(request()).id
        with servers.frozen("mysql"):

            def create(number: int) -> tuple[grpc.StatusCode, float, Any]:
                start = time.monotonic()
                with pytest.raises(grpc.RpcError) as caught:
                    tasks.Create(request(number), timeout=30)
                retry = detail(caught.value, error_details_pb2.RetryInfo)
                return caught.value.code(), time.monotonic() - start, retry.retry_delay.ToMilliseconds()

            answers = list(threads.map(create, range(60)))
        codes = Counter(code for code, _, _ in answers)
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: 40, grpc.StatusCode.UNAVAILABLE: 20}
        assert max(seconds for _, seconds, _ in answers) < 15
        assert all(retry > 0 for _, _, retry in answers)
        eventually(lambda: accepts(tasks))
        eventually(db.outbox_empty, 40)
    assert first in db.ids()
    assert set(installation.published_ids()) == db.ids()


def accepts(tasks: Any) -> bool:
    try:
        return bool(tasks.Create(request()).id)
    except grpc.RpcError:
        return False


def kill_sessions(db: Db) -> int:
    """Kill all other sessions on this database; return their number."""
    cuts = 0
    with db.engine.connect() as connection, suppress(DBAPIError):
        # The list cannot show some bytes of a statement, and a session may just have ended.
        database = connection.exec_driver_sql("SELECT DATABASE(), CONNECTION_ID()").one()
        for session in connection.exec_driver_sql("SHOW PROCESSLIST").all():
            if session.db == database[0] and session.Id != database[1]:
                connection.exec_driver_sql(f"KILL {session.Id}")
                cuts += 1
    return cuts


def test_killed_connections_lose_and_duplicate_no_task(installation: Installation, db: Db) -> None:
    with ApiProcess(installation) as api, Load(api) as load:
        cuts = 0
        while cuts < CUTS or len(load.accepted) < 5 * CUTS:
            cuts += kill_sessions(db)
            time.sleep(0.05)
    assert cuts >= CUTS
    assert set(load.accepted) <= db.ids()
    assert len(load.accepted) == len(set(load.accepted))
    # After an error a task may be recorded or not.
    assert len(db.ids()) <= len(load.accepted) + len(load.refused)
    with ApiProcess(installation):
        eventually(db.outbox_empty, 60)
    assert set(installation.published_ids()) == db.ids()
