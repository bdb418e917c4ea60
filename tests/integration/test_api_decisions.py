"""Cancel, Retry and Resolve on both databases, against claims by the sender."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from datetime import datetime

import grpc
import pytest
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2 as pb
from services.api import outbox, outbox_sweeper, queries, uuid7
from services.api.cancelling import Cancelled, cancel
from services.api.database_threads import DatabaseThreads
from services.api.decider import Decider
from services.api.errors import StatusError
from services.api.resolving import NotResolvable, Resolved, resolve
from services.api.retrying import NotRetryable, Retried, retry
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.deliveries.decide import (
    IN_DOUBT,
    NOT_SENT,
    Cancel,
    Claim,
    Delivery,
    Settled,
    Stale,
    Taken,
    Wait,
)
from services.common.deliveries.mx_failures import store_failures
from services.common.deliveries.row_events import event_of
from services.common.deliveries.rows import COLUMNS, owner_tokens
from services.common.events import Event, encode
from services.common.fold import TaskRow, delta, fold
from services.common.stage.types import Done
from services.common.timeline import timeline_row
from services.sender.claims import Claims
from services.sender.outcome_of_record import outcome_of_record
from tests.api_process import free_port
from tests.claimers import everyone
from tests.stack import Infra

TENANT = "blue"
ID_GENERATOR = uuid7.IdGenerator()
LONG_AGO = datetime(2001, 2, 3)
token = owner_tokens()


class TaskTables:
    """A database, and the events of each task that were published so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.claims = Claims(engine, 60, hold=False)
        self.events: dict[bytes, list[Event]] = {}

    def create(self, send_at_us: int = 0) -> bytes:
        id_, at_us = ID_GENERATOR.new()
        task = pb.MailTask(
            id=id_,
            tenant=TENANT,
            email="a@shop.test",
            domain="shop.test",
            subject="Hello",
            body="text",
            created_at_us=at_us,
        )
        event = pb.TaskCreated(task=task, at_us=at_us, send_at_us=send_at_us)

        def write(connection: Connection) -> None:
            taskstore.insert_bodies(connection, [taskstore.body_of(task)])
            item = outbox.row_of(event)
            if send_at_us:
                outbox.insert_scheduled(connection, [(item, from_micros(send_at_us))])
            else:
                outbox.put(connection, [item])

        transaction(self.engine, write)
        self.publish(id_, event)
        return id_

    def publish(self, id_: bytes, *events: Event) -> None:
        """Fold events into the tables, as the status service does."""
        self.events.setdefault(id_, []).extend(events)

        def write(connection: Connection) -> None:
            taskstore.upsert(connection, map(delta, events))
            taskstore.insert_events(connection, map(timeline_row, events))
            store_failures(connection, [event for event in events if isinstance(event, pb.MxFailed)])

        transaction(self.engine, write)

    def ok(self, id_: bytes, epoch: int = 0) -> None:
        """Fold the verdict that the domain takes mail."""
        self.publish(id_, pb.MxOk(task=self.mail(id_), epoch=epoch, attempt=1, at_us=time.time_ns() // 1000))

    def mail(self, id_: bytes) -> pb.MailTask:
        created = self.events[id_][0]
        assert isinstance(created, pb.TaskCreated)
        return created.task

    def claim(self, id_: bytes, epoch: int = 0, attempt: int = 1) -> object:
        return self.claims.claim([Claim(id_, epoch, attempt, token(), "<m@x>")])[0]

    def claimed(self, id_: bytes, epoch: int = 0, attempt: int = 1) -> Delivery:
        answer = self.claim(id_, epoch, attempt)
        assert isinstance(answer, Taken), answer
        return answer.row

    def settle(
        self, row: Delivery, state: str, reason: str = "", reply: str = "", folded: bool = True
    ) -> Delivery:
        """Settle a claim. With `folded` the status service has folded its event too."""
        due = time.time_ns() // 1000 + 10**9 if state == "deferred" else 0
        settled = row._replace(
            state=state,  # type: ignore[arg-type]
            settled_at=time.time_ns() // 1000,
            next_attempt_at=due,
            reason=reason,
            reply=reply,
            relay="mx.test:25",
        )
        self.claims.store([settled])
        if folded and state != "released":
            self.publish(row.task_id, event_of(settled))
        return settled

    def expire(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE deliveries SET lease_until = %s", (LONG_AGO,))

    def cancel(self, id_: bytes, tenant: str = TENANT) -> Cancelled | Wait | None:
        now_us = time.time_ns() // 1000
        return transaction(self.engine, lambda c: cancel(c, tenant, id_, token(), now_us))

    def cancelled(self, id_: bytes) -> Cancelled:
        """Cancel the task; publish the event, also to the sender."""
        decision = self.cancel(id_)
        assert isinstance(decision, Cancelled), decision
        if decision.event is None:
            return decision
        self.events[id_].append(decision.event)
        assert decision.task.id == uuid7.text(id_)
        # A sweeper would publish an equal event.
        item = outbox.row_of(decision.event)
        assert item in self.outbox(id_)
        found = transaction(self.engine, lambda c: outbox_sweeper.events_of_rows(c, [item]))
        assert encode(found[item], "api") == encode(decision.event, "api")
        self.events[id_] += self.sender_handles(decision.event)
        return decision

    def sender_handles(self, event: pb.TaskCancelled) -> list[Event]:
        """Return the events that the sender publishes when it reads a cancellation."""
        [answer] = self.claims.claim([Cancel(event.id, event.epoch, token())])
        if isinstance(answer, Stale):
            return []
        assert isinstance(answer, Settled), answer
        outcome = outcome_of_record(answer.row, (60,), 0)
        assert isinstance(outcome, Done)
        return list(outcome.events)

    def resolve(self, id_: bytes, sent: bool, tenant: str = TENANT) -> Resolved | NotResolvable | None:
        now_us = time.time_ns() // 1000
        return transaction(
            self.engine, lambda c: resolve(c, tenant, id_, sent=sent, owner=token(), now_us=now_us)
        )

    def resolved(self, id_: bytes, sent: bool) -> Resolved:
        """Resolve the task; publish the event, and that of the doubt before it."""
        decision = self.resolve(id_, sent)
        assert isinstance(decision, Resolved), decision
        assert decision.event is not None
        self.events[id_] += [decision.event]
        self.sweep(id_, decision.event)
        return decision

    def sweep(self, id_: bytes, event: Event) -> None:
        """Publish as a sweeper does: the event itself, and the doubt of the epoch before."""
        items = [item for item in self.outbox(id_) if item.kind != outbox.CREATED]
        found = transaction(self.engine, lambda c: outbox_sweeper.events_of_rows(c, items))
        assert set(found) == set(items)
        published = [encode(event_, "api") for event_ in found.values()]
        assert encode(event, "api") in published
        doubts = [
            event_ for event_ in found.values() if isinstance(event_, pb.MailFailed) and event_.uncertain
        ]
        assert len(doubts) == 1
        self.events[id_] += doubts

    def retry(self, id_: bytes, tenant: str = TENANT, tried_epoch: int = 0) -> Retried | NotRetryable | None:
        now_ms = time.time_ns() // 1_000_000
        return transaction(self.engine, lambda c: retry(c, tenant, id_, now_ms, tried_epoch))

    def reopened(self, id_: bytes) -> int:
        """Retry the task; return the new epoch."""
        decision = self.retry(id_)
        assert isinstance(decision, Retried), decision
        self.events[id_].append(decision.event)
        assert (decision.task.status, decision.task.attempts) == ("pending", 0)
        item = outbox.row_of(decision.event)
        assert item in self.outbox(id_)
        found = transaction(self.engine, lambda c: outbox_sweeper.events_of_rows(c, [item]))
        assert encode(found[item], "api") == encode(decision.event, "api")
        return item.epoch

    def row(self, id_: bytes) -> TaskRow:
        with self.engine.connect() as connection:
            query = f"SELECT {', '.join(TaskRow._fields)} FROM tasks WHERE id = %s"
            return TaskRow(*connection.exec_driver_sql(query, (id_,)).one())

    def delivery(self, id_: bytes) -> Delivery | None:
        with self.engine.connect() as connection:
            query = f"SELECT {COLUMNS} FROM deliveries WHERE task_id = %s"
            found = connection.exec_driver_sql(query, (id_,)).first()
        return None if found is None else Delivery(*found)

    def outbox(self, id_: bytes, due: bool = False) -> list[outbox.OutboxRow]:
        when = "AND available_at <= UTC_TIMESTAMP(6)" if due else ""
        with self.engine.connect() as connection:
            query = f"SELECT task_id, kind, epoch FROM outbox WHERE task_id = %s {when}"
            return [outbox.OutboxRow(*row) for row in connection.exec_driver_sql(query, (id_,))]

    def kinds(self, id_: bytes) -> list[str]:
        with self.engine.connect() as connection:
            query = "SELECT kind FROM task_events WHERE task_id = %s ORDER BY at, kind"
            return [str(kind) for (kind,) in connection.exec_driver_sql(query, (id_,))]

    def assert_folded(self, id_: bytes) -> None:
        """Assert that a fold of the published events gives the same tables."""
        events = self.events[id_]
        row: TaskRow | None = None
        for event in random.sample(events, len(events)):
            row = fold(row, event)
        assert self.row(id_) == row
        with self.engine.connect() as connection:
            query = "SELECT event_id FROM task_events WHERE task_id = %s"
            lines = {line for (line,) in connection.exec_driver_sql(query, (id_,))}
        assert lines == {timeline_row(event).event_id for event in events}


@pytest.fixture(scope="module", params=["mysql", "mariadb"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on one database for all tests: each looks at its own tasks only."""
    server: Infra = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb")
    engine = make_engine(server.migrated_database())
    yield engine
    engine.dispose()


@pytest.fixture
def tables(engine: Engine) -> TaskTables:
    return TaskTables(engine)


# --- Cancel ---------------------------------------------------------------------------------------


def test_a_cancelled_task_is_never_claimed(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.ok(id_)
    decision = tables.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert tables.kinds(id_) == ["created", "mx_ok", "cancelled"]
    assert isinstance(tables.claim(id_), Stale)
    tables.assert_folded(id_)
    # A late verdict overrules nothing.
    tables.publish(id_, pb.MxFailed(id=id_, attempt=2, reason="null_mx", at_us=time.time_ns() // 1000))
    assert tables.row(id_).status == "cancelled"
    assert isinstance(tables.claim(id_, attempt=3), Stale)
    tables.assert_folded(id_)


def test_a_second_cancel_answers_the_same_and_changes_nothing(tables: TaskTables) -> None:
    id_ = tables.create()
    first = tables.cancelled(id_)
    second = tables.cancelled(id_)
    assert (second.task, second.event) == (first.task, None)
    assert len(tables.outbox(id_)) == 2
    tables.assert_folded(id_)


def test_a_cancelled_tasks_scheduled_event_is_due_at_once(tables: TaskTables) -> None:
    id_ = tables.create(send_at_us=time.time_ns() // 1000 + 3600 * 10**6)
    assert tables.outbox(id_, due=True) == []
    decision = tables.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert not decision.task.HasField("next_attempt_at")
    assert tables.outbox(id_, due=True) == [outbox.created(id_)]
    # It is the recorded event.
    [event] = transaction(
        tables.engine, lambda c: outbox_sweeper.events_of_rows(c, [outbox.created(id_)])
    ).values()
    assert event == tables.events[id_][0]
    tables.assert_folded(id_)


def test_a_retry_keeps_a_send_time_in_the_future(tables: TaskTables) -> None:
    at_us = time.time_ns() // 1000 + 3600 * 10**6
    id_ = tables.create(send_at_us=at_us)
    tables.cancelled(id_)
    epoch = tables.reopened(id_)
    assert tables.row(id_).next_attempt_at == from_micros(at_us)
    assert outbox.created(id_, epoch) not in tables.outbox(id_, due=True)
    tables.assert_folded(id_)
    # After a second cancellation this event is due at once too, with the same send time.
    tables.cancelled(id_)
    assert outbox.created(id_, epoch) in tables.outbox(id_, due=True)
    assert tables.reopened(id_) > epoch
    assert tables.row(id_).next_attempt_at == from_micros(at_us)
    tables.assert_folded(id_)


def test_a_retry_after_its_send_time_is_due_at_once(tables: TaskTables) -> None:
    id_ = tables.create(send_at_us=time.time_ns() // 1000 - 10**6)
    tables.cancelled(id_)
    tables.reopened(id_)
    assert tables.row(id_).next_attempt_at is None


@pytest.mark.parametrize("kind", ["mx_ok", "mx_failed", "deferred"])
def test_a_cancelled_tasks_timeline_shows_no_later_validation(tables: TaskTables, kind: str) -> None:
    id_ = tables.create(send_at_us=time.time_ns() // 1000 + 3600 * 10**6)
    cancelled = tables.cancelled(id_).event
    assert cancelled is not None
    task, late = pb.MailTask(id=id_, tenant=TENANT), cancelled.at_us + 1000
    verdict: dict[str, Event] = {
        "mx_ok": pb.MxOk(task=task, attempt=1, at_us=late),
        "mx_failed": pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=late),
        "deferred": pb.MailDeferred(id=id_, attempt=1, stage="validator", reason="x", at_us=late),
    }
    tables.publish(id_, verdict[kind])
    with tables.engine.connect() as connection:
        task_ = queries.get(connection, TENANT, id_)
    assert task_ is not None
    assert [line.kind for line in task_.timeline] == ["created", "cancelled"]
    # The timeline shows a verdict on the next epoch.
    epoch = tables.reopened(id_)
    later = pb.MxOk(task=task, epoch=epoch, attempt=1, at_us=epoch * 1000 + 1)
    tables.publish(id_, later)
    with tables.engine.connect() as connection:
        task_ = queries.get(connection, TENANT, id_)
    assert task_ is not None
    assert [line.kind for line in task_.timeline] == ["created", "cancelled", "retried", "mx_ok"]


def test_a_cancelled_deferred_task_keeps_its_attempts_and_gets_no_more(tables: TaskTables) -> None:
    folded, unfolded = tables.create(), tables.create()
    for id_ in (folded, unfolded):
        tables.settle(tables.claimed(id_), "deferred", "deferred", "451 later")
        row = tables.claimed(id_, attempt=2)
        tables.settle(row, "deferred", "deferred", "451 later", folded=id_ == folded)
        decision = tables.cancelled(id_)
        assert (decision.task.status, decision.task.attempts) == ("cancelled", 2)
        assert not decision.task.HasField("next_attempt_at")
        assert isinstance(tables.claim(id_, attempt=3), Stale)
        tables.assert_folded(id_)


def test_a_task_with_a_released_claim_can_be_cancelled(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "released")
    assert tables.cancelled(id_).task.status == "cancelled"
    tables.assert_folded(id_)


def test_a_cancel_waits_while_a_sender_has_the_mail(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.ok(id_)
    row = tables.claimed(id_)
    before = tables.row(id_)
    answer = tables.cancel(id_)
    assert isinstance(answer, Wait)
    assert 0 < answer.seconds <= 60
    assert tables.row(id_) == before
    assert tables.outbox(id_) == [outbox.created(id_)]
    # The next Cancel answers with the sender's outcome, even before it is folded.
    sent = tables.settle(row, "sent", reply="250 ok", folded=False)
    decision = tables.cancelled(id_)
    assert (decision.task.status, decision.task.reply) == ("completed", "250 ok")
    assert decision.event is None
    tables.events[id_].append(event_of(sent))
    tables.assert_folded(id_)


@pytest.mark.parametrize("folded", [True, False])
def test_a_cancel_of_a_failed_task_answers_with_the_failure(tables: TaskTables, folded: bool) -> None:
    for row in [tables.settle(tables.claimed(tables.create()), "failed", "rejected", "550 no", folded)]:
        decision = tables.cancelled(row.task_id)
        assert (decision.task.status, decision.task.reason) == (row.state, row.reason)
        assert decision.event is None
        delivery = tables.delivery(row.task_id)
        assert delivery is not None
        assert delivery == row._replace(lease_until=delivery.lease_until)
        if not folded:
            tables.events[row.task_id].append(event_of(row))
        tables.assert_folded(row.task_id)


def test_a_cancel_after_a_failed_verdict_answers_failed(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.publish(id_, pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=5))
    decision = tables.cancelled(id_)
    assert (decision.task.status, decision.task.reason, decision.event) == ("failed", "null_mx", None)
    tables.assert_folded(id_)


def test_a_cancel_of_a_mail_in_doubt_makes_the_task_uncertain(tables: TaskTables) -> None:
    for expired in (True, False):
        id_ = tables.create()
        tables.ok(id_)
        row = tables.claimed(id_)
        if expired:
            tables.expire()
        else:
            tables.settle(row, "deferred", IN_DOUBT)
        decision = tables.cancelled(id_)
        assert decision.event is not None
        assert (decision.task.status, decision.task.reason) == ("uncertain", IN_DOUBT)
        assert decision.task.attempts == 1
        # The sender published the doubt when it read the cancellation.
        assert isinstance(tables.events[id_][-1], pb.MailFailed)
        assert isinstance(tables.claim(id_, attempt=2), Stale)
        tables.assert_folded(id_)
        assert tables.cancelled(id_).task.status == "cancelled"
        tables.assert_folded(id_)


def test_a_retried_task_is_cancelled_in_its_new_epoch(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "failed", "rejected", "550 no")
    epoch = tables.reopened(id_)
    decision = tables.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert isinstance(tables.claim(id_, epoch), Stale)
    tables.assert_folded(id_)


def test_a_failed_task_whose_mail_is_still_deferred_is_cancelled(tables: TaskTables) -> None:
    """A replay found no domain any more, while the earlier record is still on a delay topic."""
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "deferred", "deferred", "451 later")
    tables.publish(id_, pb.MxFailed(id=id_, epoch=7, attempt=1, reason="no_such_domain", at_us=9))
    assert tables.row(id_).status == "failed"
    assert tables.cancelled(id_).task.status == "cancelled"
    assert isinstance(tables.claim(id_, attempt=2), Stale)
    tables.assert_folded(id_)


def test_a_tenant_cannot_decide_about_anothers_task(tables: TaskTables) -> None:
    id_ = tables.create()
    assert tables.cancel(id_, "red") is None
    assert tables.cancel(bytes(16)) is None
    tables.cancelled(id_)
    assert tables.retry(id_, "red") is None
    assert tables.retry(bytes(16)) is None


# --- Retry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "uncertain", "cancelled", "refused"])
def test_a_task_that_ended_without_its_mail_is_retried_and_sent_once(tables: TaskTables, state: str) -> None:
    id_ = tables.create()
    match state:
        case "cancelled":
            tables.cancelled(id_)
        case "refused":
            tables.publish(id_, pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=5))
        case "failed":
            tables.settle(tables.claimed(id_), "failed", "rejected", "550 no")
        case "uncertain":
            tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT)
    epoch = tables.reopened(id_)
    assert tables.kinds(id_)[-1] == "retried"
    tables.assert_folded(id_)
    assert not isinstance(tables.claim(id_), Taken), "the old record sends nothing"
    tables.settle(tables.claimed(id_, epoch), "sent", reply="250 ok")
    assert tables.row(id_).status == "completed"
    assert tables.retry(id_) == NotRetryable("completed")
    assert isinstance(tables.claim(id_, epoch + 1), Settled)
    tables.assert_folded(id_)


@pytest.mark.parametrize("folded", [True, False])
def test_a_sent_task_is_never_retried(tables: TaskTables, folded: bool) -> None:
    id_ = tables.create()
    row = tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT)
    # The sender got the relay's reply after all.
    late = tables.settle(row._replace(state="sending"), "sent", reply="250 ok", folded=folded)
    assert tables.retry(id_) == NotRetryable("completed")
    if not folded:
        stored = tables.delivery(id_)
        assert stored is not None
        tables.events[id_].append(event_of(stored))
    assert late.state == "sent"
    tables.assert_folded(id_)


def test_a_task_in_progress_is_not_retried(tables: TaskTables) -> None:
    id_ = tables.create()
    assert tables.retry(id_) == NotRetryable("pending")
    tables.ok(id_)
    assert tables.retry(id_) == NotRetryable("processing")
    tables.settle(tables.claimed(id_), "deferred", "deferred", "451 later")
    assert tables.retry(id_) == NotRetryable("processing")


@pytest.mark.parametrize("state", ["sending", "deferred"])
def test_a_claimed_task_with_a_late_verdict_is_not_retried(tables: TaskTables, state: str) -> None:
    id_ = tables.create()
    tables.ok(id_)
    row = tables.claimed(id_)
    if state == "deferred":
        tables.settle(row, "deferred", "greylisted", folded=False)
    tables.publish(id_, pb.MxFailed(id=id_, attempt=1, reason="no_such_domain", at_us=9))
    assert tables.retry(id_) == NotRetryable("processing")


def test_a_task_without_its_body_is_not_retried(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "failed", "rejected", "550 no")
    with tables.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM task_bodies WHERE task_id = %s", (id_,))
    assert tables.retry(id_) == NotRetryable("failed", purged=True)
    assert tables.row(id_).status == "failed"


def test_one_of_several_concurrent_retries_opens_the_task(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.cancelled(id_)
    answers = everyone(6, lambda number: tables.retry(id_))
    assert sum(isinstance(answer, Retried) for answer in answers) == 1
    assert [answer for answer in answers if isinstance(answer, NotRetryable)] == [NotRetryable("pending")] * 5


def test_a_retry_with_an_unnoticed_commit_opens_the_task_once(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.cancelled(id_)
    first = tables.retry(id_)
    assert isinstance(first, Retried)
    second = tables.retry(id_, tried_epoch=first.event.epoch)
    assert second == first
    assert len(tables.outbox(id_)) == 3


def test_a_clock_that_is_behind_begins_no_earlier_epoch(tables: TaskTables) -> None:
    id_ = tables.create()
    far = 1 << 41
    tables.publish(id_, pb.TaskCreated(task=tables.mail(id_), epoch=far, at_us=far * 1000))
    tables.settle(tables.claimed(id_, far + 3), "failed", "rejected", "550 no")
    assert tables.reopened(id_) == far + 4
    assert tables.cancelled(id_).task.status == "cancelled"
    assert tables.reopened(id_) == far + 6
    tables.assert_folded(id_)


# --- races ----------------------------------------------------------------------------------------


def test_concurrent_cancels_and_claims_agree(tables: TaskTables) -> None:
    """Each task is either cancelled and never claimed, or claimed and answered as completed."""
    ids = [tables.create() for _ in range(60)]
    claimed: set[bytes] = set()
    lock, begun = threading.Lock(), threading.Event()
    answers: dict[bytes, set[str]] = {id_: set() for id_ in ids}

    def send(rng: random.Random) -> None:
        left = rng.sample(ids, len(ids))
        while left:
            batch, left = left[: rng.randrange(1, 20)], left[20:]
            found = tables.claims.claim([Claim(id_, 0, 1, token(), "<m@x>") for id_ in batch])
            mine = [answer.row for answer in found if isinstance(answer, Taken)]
            with lock:
                assert claimed.isdisjoint(row.task_id for row in mine)
                claimed.update(row.task_id for row in mine)
            if mine:
                begun.set()
                tables.claims.store([row._replace(state="sent", settled_at=1) for row in mine])

    def cancel_all(rng: random.Random) -> None:
        assert begun.wait(20)
        for id_ in rng.sample(ids, len(ids)):
            while isinstance(decision := tables.cancel(id_), Wait):
                time.sleep(0.001)
            assert isinstance(decision, Cancelled)
            with lock:
                answers[id_].add(decision.task.status)

    roles = [send, send, cancel_all, cancel_all]
    everyone(len(roles), lambda number: roles[number](random.Random(number)))
    for id_ in ids:
        assert answers[id_] == {"completed" if id_ in claimed else "cancelled"}
        delivery = tables.delivery(id_)
        assert delivery is not None
        assert delivery.state == ("sent" if id_ in claimed else "cancelled")
    assert 0 < len(claimed) < len(ids), "one side won every race"


# --- through a Decider ----------------------------------------------------------------------------


class RunningDecider:
    """A Decider on a database, and the events that it published."""

    def __init__(self, engine: Engine) -> None:
        self.published: list[Event] = []
        self._threads = DatabaseThreads(engine)
        self.decider = Decider(self._threads, lambda batch: self.published.extend(r.event for r in batch))

    def __enter__(self) -> RunningDecider:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()


async def test_a_cancel_waits_for_the_senders_outcome_for_some_seconds(tables: TaskTables) -> None:
    done, stuck = tables.create(), tables.create()
    row = tables.claimed(done)
    tables.claimed(stuck)
    with RunningDecider(tables.engine) as running:
        asked = asyncio.ensure_future(running.decider.cancel(TENANT, done, b""))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await asyncio.to_thread(tables.settle, row, "sent", reply="250 ok", folded=False)
        assert (await asked).status == "completed"
        began = time.monotonic()
        with pytest.raises(StatusError) as caught:
            await running.decider.cancel(TENANT, stuck, b"")
        assert 3 < time.monotonic() - began < 15
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        info, again = caught.value.details
        assert info.reason == "BEING_SENT"  # type: ignore[attr-defined]
        assert again.retry_delay.ToMilliseconds() > 0  # type: ignore[attr-defined]
        assert running.published == []
        assert tables.outbox(stuck) == [outbox.created(stuck)]


async def test_a_decision_is_published_at_once(tables: TaskTables) -> None:
    id_ = tables.create()
    with RunningDecider(tables.engine) as running:
        assert (await running.decider.cancel(TENANT, id_, b"")).status == "cancelled"
        assert (await running.decider.cancel(TENANT, id_, b"")).status == "cancelled"
        assert (await running.decider.retry(TENANT, id_, b"")).status == "pending"
        with pytest.raises(StatusError) as caught:
            await running.decider.retry(TENANT, id_, b"")
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert [type(event) for event in running.published] == [pb.TaskCancelled, pb.TaskCreated]
        assert {outbox.row_of(event) for event in running.published} < set(tables.outbox(id_))  # type: ignore[arg-type]
        for ask in (running.decider.cancel, running.decider.retry):
            with pytest.raises(StatusError) as caught:
                await ask("red", id_, b"")
            assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_without_the_database_decisions_are_unavailable(tables: TaskTables) -> None:
    id_ = tables.create()
    engine = make_engine(tables.engine.url.set(port=free_port()))
    with RunningDecider(engine) as running:
        for ask in (running.decider.cancel, running.decider.retry):
            began = time.monotonic()
            with pytest.raises(StatusError) as caught:
                await ask(TENANT, id_, b"")
            assert time.monotonic() - began < 15
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert any(hasattr(detail, "retry_delay") for detail in caught.value.details)


# --- uncertain tasks ------------------------------------------------------------------------------


@pytest.mark.parametrize("folded", [True, False])
def test_an_uncertain_task_is_cancelled_and_its_timeline_keeps_the_doubt(
    tables: TaskTables, folded: bool
) -> None:
    id_ = tables.create()
    row = tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT, folded=folded)
    decision = tables.cancelled(id_)
    assert decision.event is not None
    assert (decision.task.status, decision.task.attempts) == ("cancelled", 1)
    assert (decision.event.in_doubt, timeline_row(decision.event).detail) == (
        True,
        "the mail may have gone out",
    )
    if not folded:
        # The sender died before it published the doubt.
        tables.sweep(id_, decision.event)
        assert event_of(row) in tables.events[id_]
    tables.assert_folded(id_)
    assert not isinstance(tables.claim(id_), Taken)
    assert tables.cancelled(id_).event is None
    # After a Retry the mail may be sent, so the next Cancel finds it in doubt again.
    epoch = tables.reopened(id_)
    again = tables.claimed(id_, epoch)
    assert again.doubts_in_all == 1
    tables.settle(again, "deferred", "deferred", "451 later")
    assert tables.cancelled(id_).task.status == "uncertain"


def test_a_cancel_with_an_unnoticed_commit_does_not_close_the_doubt_that_it_found(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "deferred", IN_DOUBT)
    owner, now_us = token(), time.time_ns() // 1000
    for _ in range(2):
        answered = transaction(tables.engine, lambda c: cancel(c, TENANT, id_, owner, now_us))
        assert isinstance(answered, Cancelled)
        assert answered.task.status == "uncertain"


@pytest.mark.parametrize("folded", [True, False])
def test_a_mail_resolved_as_sent_is_never_sent_again(tables: TaskTables, folded: bool) -> None:
    id_ = tables.create()
    row = tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT, folded=folded)
    decision = tables.resolved(id_, sent=True)
    assert (decision.task.status, decision.task.message_id) == ("completed", row.message_id)
    tables.assert_folded(id_)
    assert (tables.kinds(id_)[-1], timeline_row(decision.event).stage) == ("sent", "api")  # type: ignore[arg-type]
    for epoch in (0, decision.event.epoch + 1):  # type: ignore[union-attr]
        stored = tables.claim(id_, epoch, attempt=2)
        assert isinstance(stored, Settled)
        assert encode(event_of(stored.row), "x").value == encode(decision.event, "x").value  # type: ignore[arg-type]
    assert tables.retry(id_) == NotRetryable("completed")
    assert tables.cancelled(id_).task.status == "completed"
    # A second Resolve changes nothing, and the opposite one is refused.
    assert tables.resolve(id_, sent=True) == Resolved(decision.task, None)
    assert tables.resolve(id_, sent=False) == NotResolvable("completed")


def test_a_mail_resolved_as_not_sent_has_failed_and_can_be_retried(tables: TaskTables) -> None:
    id_ = tables.create()
    row = tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT)
    decision = tables.resolved(id_, sent=False)
    assert (decision.task.status, decision.task.reason) == ("failed", NOT_SENT)
    tables.assert_folded(id_)
    assert isinstance(tables.claim(id_, attempt=2), Stale)
    assert tables.resolve(id_, sent=False) == Resolved(decision.task, None)
    assert tables.resolve(id_, sent=True) == NotResolvable("failed")
    again = tables.claimed(id_, tables.reopened(id_))
    assert (again.message_id, again.doubts_in_all) == (row.message_id, 0)
    tables.settle(again, "sent", reply="250 ok")
    tables.assert_folded(id_)


def test_only_an_uncertain_task_is_resolved(tables: TaskTables) -> None:
    id_ = tables.create()
    assert tables.resolve(id_, sent=True) == NotResolvable("pending")
    tables.settle(tables.claimed(id_), "failed", "rejected", "550 no")
    assert tables.resolve(id_, sent=True) == tables.resolve(id_, sent=False) == NotResolvable("failed")
    assert tables.resolve(id_, True, "red") is None
    assert tables.resolve(bytes(16), sent=True) is None


def test_an_uncertain_task_whose_delivery_was_lost_is_resolved(tables: TaskTables) -> None:
    id_ = tables.create()
    tables.settle(tables.claimed(id_), "uncertain", IN_DOUBT)
    with tables.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM deliveries WHERE task_id = %s", (id_,))
    decision = tables.resolve(id_, sent=True)
    assert isinstance(decision, Resolved)
    assert decision.task.status == "completed"
    assert isinstance(tables.claim(id_), Settled)
