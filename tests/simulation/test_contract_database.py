"""The in-memory claims, outbox and task tables behave like MySQL's. Each test runs on both."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, Engine, text

from postroad.v1 import events_pb2 as pb
from services.api import locked_task, outbox
from services.api.outbox import created
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.deliveries import rows
from services.common.deliveries.decide import (
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settled,
    Stale,
    Taken,
    Wait,
    released_row,
)
from services.common.deliveries.settlement import Settlement
from services.common.fold import TaskRow, delta
from services.sender.claims import Claims
from tests.simulation.database import Database, MemoryClaims
from tests.simulation.scheduler import Scheduler
from tests.simulation.world import World
from tests.stack import Infra

R = TypeVar("R")
_LEASE = 60.0
_numbers = count(1)


class Memory:
    """The simulation's database."""

    def __init__(self, hold: bool) -> None:
        self.world = World(Scheduler(1))
        self.database = Database(self.world)
        self.claims: Any = MemoryClaims(self.database, _LEASE, hold)

    def expire(self) -> None:
        """End all leases."""
        self.world.scheduler.run(self.world.now + 2 * _LEASE)

    def row(self, id_: bytes) -> Delivery | None:
        """Return a delivery."""
        return self.database.deliveries.get(id_)

    def task(self, id_: bytes) -> TaskRow | None:
        """Return a task."""
        return self.database.tasks.get(id_)

    def transact(self, work: Callable[[Any], R]) -> R:
        """Run statements in one transaction."""
        return self.database.transact(work)

    @property
    def store(self) -> Any:
        """The statements: functions of a connection and more arguments."""
        return Database


class _Statements:
    upsert = staticmethod(taskstore.upsert)
    insert_bodies = staticmethod(taskstore.insert_bodies)
    insert_events = staticmethod(taskstore.insert_events)
    owners_of_keys = staticmethod(taskstore.owners_of_keys)
    load_tasks = staticmethod(taskstore.load_tasks)
    put = staticmethod(outbox.put)
    take = staticmethod(outbox.take)
    delete = staticmethod(outbox.delete)
    defer = staticmethod(outbox.defer)
    lock_row = staticmethod(locked_task.lock_row)
    lock_rows = staticmethod(rows.lock_rows)
    store_rows = staticmethod(rows.store_rows)
    insert_row = staticmethod(rows.insert_row)


class Real:
    """MySQL."""

    store: Any = _Statements

    def __init__(self, engine: Engine, hold: bool) -> None:
        self.engine = engine
        self.claims: Any = Claims(engine, _LEASE, hold)

    def expire(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text("UPDATE deliveries SET lease_until = lease_until - INTERVAL 2 MINUTE"))

    def row(self, id_: bytes) -> Delivery | None:
        columns = rows.COLUMNS
        query = f"SELECT {columns} FROM deliveries WHERE task_id = %s"
        with self.engine.begin() as connection:
            found = connection.exec_driver_sql(query, (id_,)).one_or_none()
        return Delivery(*found) if found is not None else None

    def task(self, id_: bytes) -> TaskRow | None:
        query = f"SELECT {', '.join(TaskRow._fields)} FROM tasks WHERE id = %s"
        with self.engine.begin() as connection:
            found = connection.exec_driver_sql(query, (id_,)).one_or_none()
        return TaskRow(*found) if found is not None else None

    def transact(self, work: Callable[[Connection], R]) -> R:
        return transaction(self.engine, work)


Side = Memory | Real


@pytest.fixture(scope="session")
def mysql(infra: Infra) -> Iterator[Engine]:
    url = infra.migrated_database()
    engine = make_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture(params=["resend", "hold"])
def hold(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "hold")


@pytest.fixture(params=["memory", "mysql"])
def side(request: pytest.FixtureRequest, hold: bool) -> Side:
    if request.param == "memory":
        return Memory(hold)
    return Real(request.getfixturevalue("mysql"), hold)


@pytest.fixture
def one(request: pytest.FixtureRequest) -> Side:
    """Return either side, for tests that do not depend on the policy for doubts."""
    return Memory(False) if request.param == "memory" else Real(request.getfixturevalue("mysql"), False)


both = pytest.mark.parametrize("one", ["memory", "mysql"], indirect=True)


def new_id() -> bytes:
    return random.randbytes(12) + next(_numbers).to_bytes(4, "big")


def claim(id_: bytes, epoch: int = 0, attempt: int = 1, owner: bytes | None = None) -> Claim:
    return Claim(id_, epoch, attempt, owner or new_id(), "<id@a.test>")


def taken(side: Side, request: Claim) -> Delivery:
    [answer] = side.claims.claim([request])
    assert isinstance(answer, Taken)
    return answer.row


# --- claims ---------------------------------------------------------------------------------------


def test_a_claim_holds_until_its_lease_is_over_and_the_task_is_in_doubt_then(side: Side, hold: bool) -> None:
    id_ = new_id()
    first = taken(side, claim(id_))
    [waiting] = side.claims.claim([claim(id_)])
    assert isinstance(waiting, Wait)
    assert 0 < waiting.seconds <= _LEASE
    side.expire()
    [answer] = side.claims.claim([claim(id_)])
    if hold:
        assert isinstance(answer, Settled)
        assert answer.row.state == "uncertain"
    else:
        assert isinstance(answer, Taken)
        assert (answer.doubtful, answer.row.doubts_in_all) == (True, 1)
    assert side.claims.renew([first]) == [False]
    failed = first._replace(state="failed", settled_at=1)
    assert side.claims.store([failed]) == [Settlement.FENCED]
    assert side.claims.store([first._replace(state="sent", settled_at=2)]) == [Settlement.LATE]
    row = side.row(id_)
    assert row is not None
    assert row.state == "sent"


@both
def test_a_renewed_lease_holds_its_claim(one: Side) -> None:
    id_ = new_id()
    row = taken(one, claim(id_))
    one.expire()
    assert one.claims.renew([row]) == [True]
    [answer] = one.claims.claim([claim(id_)])
    assert isinstance(answer, Wait)


@both
def test_a_repeated_claim_of_an_owner_gets_the_same_answer(one: Side) -> None:
    request = claim(new_id())
    assert taken(one, request).owner == taken(one, request).owner


@both
def test_a_request_sees_the_effects_of_earlier_requests_in_its_call(one: Side) -> None:
    id_ = new_id()
    answers = one.claims.claim([claim(id_), claim(id_), Cancel(id_, 0, new_id())])
    assert [type(answer) for answer in answers] == [Taken, Wait, Wait]


@pytest.mark.parametrize("seed", range(8))
def test_any_history_ends_with_the_same_rows_on_both(seed: int, hold: bool, mysql: Engine) -> None:
    rng = random.Random(seed)
    memory, real = Memory(hold), Real(mysql, hold)
    ids = [new_id() for _ in range(3)]
    taken_: list[tuple[Taken, Taken]] = []
    for _ in range(60):
        step = rng.choice(
            ("claim", "claim", "claim", "settle", "settle", "back", "renew", "cancel", "expire")
        )
        if step in ("claim", "cancel"):
            requests: list[Claim | Cancel] = []
            for _ in range(rng.randrange(1, 4)):
                id_, epoch, owner = rng.choice(ids), rng.choice((0, 0, 5)), new_id()
                if step == "cancel":
                    requests.append(Cancel(id_, epoch, owner))
                else:
                    requests.append(claim(id_, epoch, rng.randrange(1, 4), owner))
            answers = list(zip(memory.claims.claim(requests), real.claims.claim(requests), strict=True))
            assert [_plain(a) for a, _ in answers] == [_plain(b) for _, b in answers]
            taken_ += [(a, b) for a, b in answers if isinstance(a, Taken) and isinstance(b, Taken)]
        elif step == "back" and taken_:
            mine, theirs = (released_row(answer) for answer in rng.choice(taken_[-3:]))
            assert memory.claims.store([mine]) == real.claims.store([theirs])
        elif step == "settle" and taken_:
            outcome: dict[str, Any] = {
                "state": rng.choice(("sent", "deferred", "failed", "uncertain", "released")),
                "reason": rng.choice(("", "in_doubt", "deferred")),
                "settled_at": rng.randrange(1, 1000),
            }
            mine, theirs = (answer.row._replace(**outcome) for answer in rng.choice(taken_))
            assert memory.claims.store([mine]) == real.claims.store([theirs])
        elif step == "renew" and taken_:
            rows_ = [[answer.row for answer in side] for side in zip(*taken_[-3:], strict=True)]
            assert memory.claims.renew(rows_[0]) == real.claims.renew(rows_[1])
        elif step == "expire":
            memory.expire()
            real.expire()
    for id_ in ids:
        assert _plain_row(memory.row(id_)) == _plain_row(real.row(id_))


def _plain(answer: ClaimAnswer) -> object:
    match answer:
        case Taken(row=row, doubtful=doubtful, earlier=earlier):
            return "taken", _plain_row(row), doubtful, _plain_row(earlier)
        case Settled(row=row):
            return "stored", _plain_row(row)
        case Wait():
            return "wait"
        case Stale():
            return "stale"


def _plain_row(row: Delivery | None) -> object:
    """Return a row without the times of either clock: the database's clock settles a row in doubt."""
    if row is None:
        return None
    values = row._asdict()
    del values["lease_until"]
    values["settled_at"] = min(values["settled_at"], 1000)
    return values


# --- tasks and outbox -----------------------------------------------------------------------------


def mail(number: int, key: str = "") -> pb.TaskCreated:
    task = pb.MailTask(
        id=new_id(),
        tenant="t",
        idempotency_key=key,
        request_hash=bytes([number]) * 32,
        email="a@b.test",
        domain="b.test",
        subject=f"s {number}",
        body="text",
        headers={"X-A": "b"},
        labels={"k": "v"},
        created_at_us=1_800_000_000_000_000 + number,
    )
    return pb.TaskCreated(task=task, at_us=task.created_at_us)


def record(side: Side, events: Sequence[pb.TaskCreated]) -> None:
    def write(connection: Any) -> None:
        side.store.upsert(connection, [delta(event) for event in events])
        side.store.insert_bodies(connection, [taskstore.body_of(event.task) for event in events])

    side.transact(write)


@both
def test_a_task_is_loaded_as_it_was_recorded(one: Side) -> None:
    event = mail(1, key=new_id().hex())
    record(one, [event])
    record(one, [event])
    assert one.transact(lambda c: one.store.load_tasks(c, [event.task.id])) == {event.task.id: event.task}


@both
def test_the_first_of_two_tasks_with_one_key_is_stored(one: Side) -> None:
    key = new_id().hex()
    first, second = mail(1, key), mail(2, key)
    record(one, [first])
    one.transact(lambda c: one.store.upsert(c, [delta(second)]))
    owners = one.transact(lambda c: one.store.owners_of_keys(c, [("t", key), ("t", key + "x")]))
    assert owners == {("t", key): (first.task.id, first.task.request_hash)}
    assert one.task(second.task.id) is None
    row = one.task(first.task.id)
    assert row is not None
    assert row.subject == "s 1"


@both
def test_events_fold_into_one_row_whatever_their_order(one: Side) -> None:
    event = mail(1)
    id_ = event.task.id
    sent = pb.MailSent(id=id_, attempt=2, message_id="<m@a.test>", at_us=1_800_000_000_500_000)
    failed = pb.MailFailed(id=id_, epoch=7, attempt=1, reason="rejected", at_us=1_800_000_000_600_000)
    for later in (failed, sent, event, failed):
        one.transact(lambda c, later=later: one.store.upsert(c, [delta(later)]))  # type: ignore[misc]
    row = one.task(id_)
    assert row is not None
    assert (row.status, row.epoch, row.attempts, row.message_id) == ("completed", 0, 2, "<m@a.test>")
    assert row.subject == "s 1"


@both
def test_a_due_outbox_row_is_taken_by_one_sweep_at_a_time(one: Side) -> None:
    one.transact(lambda c: one.store.delete(c, one.store.take(c, 1000)))
    items = sorted(created(new_id()) for _ in range(3))
    one.transact(lambda c: one.store.put(c, items))
    assert one.transact(lambda c: one.store.take(c, 10)) == [], "the outbox publisher has its grace first"
    one.transact(lambda c: one.store.defer(c, items, 0))
    one.transact(lambda c: one.store.put(c, items))
    assert sorted(one.transact(lambda c: one.store.take(c, 2)))[0] in items
    assert len(one.transact(lambda c: one.store.take(c, 10))) == 1, "a taken row is not due"
    one.transact(lambda c: one.store.defer(c, items, 0))
    one.transact(lambda c: one.store.delete(c, items[:2]))
    assert one.transact(lambda c: one.store.take(c, 10)) == items[2:]


@both
def test_a_decision_sees_the_task_and_its_delivery(one: Side) -> None:
    event = mail(4)
    id_ = event.task.id
    one.transact(lambda c: one.store.upsert(c, [delta(event)]))
    tenant = event.task.tenant
    assert one.transact(lambda c: one.store.lock_row(c, tenant, id_)) == ("pending", 0, 0)
    assert one.transact(lambda c: one.store.lock_row(c, "another", id_)) is None
    assert one.transact(lambda c: one.store.lock_rows(c, [id_]))[0] == {}
    row = taken(one, claim(id_, attempt=2))
    assert one.transact(lambda c: one.store.insert_row(c, row._replace(state="cancelled"))) is False
    [found] = one.transact(lambda c: one.store.lock_rows(c, [id_]))[0].values()
    assert (found.state, found.attempt, found.owner) == ("sending", 2, row.owner)
    changed = found._replace(state="cancelled", epoch=7)
    one.transact(lambda c: one.store.store_rows(c, [changed]))
    assert one.row(id_) == changed
    free = changed._replace(task_id=new_id())
    assert one.transact(lambda c: one.store.insert_row(c, free)) is True
    assert one.row(free.task_id) == free
