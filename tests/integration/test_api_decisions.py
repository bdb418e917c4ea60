"""Cancel and Retry on both databases: decided by the delivery's row, and told by the task's."""

from __future__ import annotations

import asyncio
import random
import threading
import time
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
    Stale,
    Stored,
    Taken,
    Wait,
)
from services.common.deliveries.mx_failures import store_failures
from services.common.deliveries.outcome import event_of
from services.common.deliveries.rows import COLUMNS, owner_tokens
from services.common.events import Event, encode
from services.common.fold import TaskRow, delta, fold
from services.common.stage.types import Done
from services.common.timeline import timeline_entry
from services.sender.answers import answer
from services.sender.claims import Claims
from tests.api_process import free_port
from tests.claimers import everyone

TENANT = "blue"
CLOCK = uuid7.Clock()
LONG_AGO = datetime(2001, 2, 3)
token = owner_tokens()


class Book:
    """A database, and the events that were told of each task so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.claims = Claims(engine, 60, hold=False)
        self.events: dict[bytes, list[Event]] = {}

    def create(self, send_at_us: int = 0) -> bytes:
        id_, at_us = CLOCK.draw()
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
                outbox.schedule(connection, [(item, from_micros(send_at_us))])
            else:
                outbox.put(connection, [item])

        transaction(self.engine, write)
        self.tell(id_, event)
        return id_

    def tell(self, id_: bytes, *events: Event) -> None:
        """Fold events into the tables, as the status service does."""
        self.events.setdefault(id_, []).extend(events)

        def write(connection: Connection) -> None:
            taskstore.upsert(connection, map(delta, events))
            taskstore.insert_events(connection, map(timeline_entry, events))
            store_failures(connection, [event for event in events if isinstance(event, pb.MxFailed)])

        transaction(self.engine, write)

    def ok(self, id_: bytes, epoch: int = 0) -> None:
        """The task's domain takes mail."""
        self.tell(id_, pb.MxOk(task=self.mail(id_), epoch=epoch, attempt=1, at_us=time.time_ns() // 1000))

    def mail(self, id_: bytes) -> pb.MailTask:
        created = self.events[id_][0]
        assert isinstance(created, pb.TaskCreated)
        return created.task

    def claim(self, id_: bytes, epoch: int = 0, attempt: int = 1) -> object:
        return self.claims.claim([Claim(id_, epoch, attempt, token(), "<m@x>")])[0]

    def taken(self, id_: bytes, epoch: int = 0, attempt: int = 1) -> Delivery:
        verdict = self.claim(id_, epoch, attempt)
        assert isinstance(verdict, Taken), verdict
        return verdict.row

    def settle(
        self, row: Delivery, state: str, reason: str = "", reply: str = "", told: bool = True
    ) -> Delivery:
        """Settle a claim; where it is `told`, the status service has heard of it."""
        due = time.time_ns() // 1000 + 10**9 if state == "deferred" else 0
        settled = row._replace(
            state=state,  # type: ignore[arg-type]
            settled_at=time.time_ns() // 1000,
            next_attempt_at=due,
            reason=reason,
            reply=reply,
            relay="mx.test:25",
        )
        self.claims.settle([settled])
        if told and state != "released":
            self.tell(row.task_id, event_of(settled))
        return settled

    def expire(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE deliveries SET lease_until = %s", (LONG_AGO,))

    def cancel(self, id_: bytes, tenant: str = TENANT) -> Cancelled | Wait | None:
        now_us = time.time_ns() // 1000
        return transaction(self.engine, lambda c: cancel(c, tenant, id_, token(), now_us))

    def cancelled(self, id_: bytes) -> Cancelled:
        """Cancel; what was decided is published, and the sender meets it."""
        decision = self.cancel(id_)
        assert isinstance(decision, Cancelled), decision
        if decision.event is None:
            return decision
        self.events[id_].append(decision.event)
        assert decision.task.id == uuid7.text(id_)
        # A sweeper would publish the same.
        item = outbox.row_of(decision.event)
        assert item in self.outbox(id_)
        found = transaction(self.engine, lambda c: outbox_sweeper.load_events(c, [item]))
        assert encode(found[item], "api") == encode(decision.event, "api")
        self.events[id_] += self.sender_meets(decision.event)
        return decision

    def sender_meets(self, event: pb.TaskCancelled) -> list[Event]:
        """Return what the sender publishes on a cancellation."""
        [verdict] = self.claims.claim([Cancel(event.id, event.epoch, token())])
        if isinstance(verdict, Stale):
            return []
        assert isinstance(verdict, Stored), verdict
        outcome = answer(verdict.row, (60,), 0)
        assert isinstance(outcome, Done)
        return list(outcome.events)

    def resolve(self, id_: bytes, sent: bool, tenant: str = TENANT) -> Resolved | NotResolvable | None:
        now_us = time.time_ns() // 1000
        return transaction(
            self.engine, lambda c: resolve(c, tenant, id_, sent=sent, owner=token(), now_us=now_us)
        )

    def resolved(self, id_: bytes, sent: bool) -> Resolved:
        """Resolve; what was decided is published, the doubt that came before it too."""
        decision = self.resolve(id_, sent)
        assert isinstance(decision, Resolved), decision
        assert decision.event is not None
        self.events[id_] += [decision.event]
        self.swept(id_, decision.event)
        return decision

    def swept(self, id_: bytes, event: Event) -> None:
        """A sweeper publishes the event as it was, and the doubt of the epoch before."""
        items = [item for item in self.outbox(id_) if item.kind != outbox.CREATED]
        found = transaction(self.engine, lambda c: outbox_sweeper.load_events(c, items))
        assert set(found) == set(items)
        published = [encode(event_, "api") for event_ in found.values()]
        assert encode(event, "api") in published
        doubts = [
            event_ for event_ in found.values() if isinstance(event_, pb.MailFailed) and event_.uncertain
        ]
        assert len(doubts) == 1
        self.events[id_] += doubts

    def retry(self, id_: bytes, tenant: str = TENANT, tried: int = 0) -> Retried | NotRetryable | None:
        now_ms = time.time_ns() // 1_000_000
        return transaction(self.engine, lambda c: retry(c, tenant, id_, now_ms, tried))

    def reopened(self, id_: bytes) -> int:
        """Retry; return the new epoch."""
        decision = self.retry(id_)
        assert isinstance(decision, Retried), decision
        self.events[id_].append(decision.event)
        assert (decision.task.status, decision.task.attempts) == ("pending", 0)
        item = outbox.row_of(decision.event)
        assert item in self.outbox(id_)
        found = transaction(self.engine, lambda c: outbox_sweeper.load_events(c, [item]))
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

    def is_what_was_told(self, id_: bytes) -> None:
        """The tables are what the topics will make of them."""
        events = self.events[id_]
        row: TaskRow | None = None
        for event in random.sample(events, len(events)):
            row = fold(row, event)
        assert self.row(id_) == row
        with self.engine.connect() as connection:
            query = "SELECT event_id FROM task_events WHERE task_id = %s"
            lines = {line for (line,) in connection.exec_driver_sql(query, (id_,))}
        assert lines == {timeline_entry(event).event_id for event in events}


@pytest.fixture
def book(engine: Engine) -> Book:
    return Book(engine)


# --- Cancel ---------------------------------------------------------------------------------------


def test_a_task_that_no_sender_has_seen_is_cancelled_and_never_taken(book: Book) -> None:
    id_ = book.create()
    book.ok(id_)
    decision = book.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert book.kinds(id_) == ["created", "mx_ok", "cancelled"]
    assert isinstance(book.claim(id_), Stale)
    book.is_what_was_told(id_)
    # A verdict that was on its way overrules nothing.
    book.tell(id_, pb.MxFailed(id=id_, attempt=2, reason="null_mx", at_us=time.time_ns() // 1000))
    assert book.row(id_).status == "cancelled"
    assert isinstance(book.claim(id_, attempt=3), Stale)
    book.is_what_was_told(id_)


def test_cancelled_again_it_answers_the_same_and_changes_nothing(book: Book) -> None:
    id_ = book.create()
    first = book.cancelled(id_)
    second = book.cancelled(id_)
    assert (second.task, second.event) == (first.task, None)
    assert len(book.outbox(id_)) == 2
    book.is_what_was_told(id_)


def test_a_scheduled_tasks_first_event_waits_no_longer(book: Book) -> None:
    id_ = book.create(send_at_us=time.time_ns() // 1000 + 3600 * 10**6)
    assert book.outbox(id_, due=True) == []
    decision = book.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert not decision.task.HasField("next_attempt_at")
    assert book.outbox(id_, due=True) == [outbox.created(id_)]
    # And it is the event that was recorded.
    [event] = transaction(
        book.engine, lambda c: outbox_sweeper.load_events(c, [outbox.created(id_)])
    ).values()
    assert event == book.events[id_][0]
    book.is_what_was_told(id_)


def test_a_retry_keeps_a_time_that_has_not_come(book: Book) -> None:
    at_us = time.time_ns() // 1000 + 3600 * 10**6
    id_ = book.create(send_at_us=at_us)
    book.cancelled(id_)
    epoch = book.reopened(id_)
    assert book.row(id_).next_attempt_at == from_micros(at_us)
    assert outbox.created(id_, epoch) not in book.outbox(id_, due=True)
    book.is_what_was_told(id_)
    # Cancelled once more, its event waits no longer either, and says what it said.
    book.cancelled(id_)
    assert outbox.created(id_, epoch) in book.outbox(id_, due=True)
    assert book.reopened(id_) > epoch
    assert book.row(id_).next_attempt_at == from_micros(at_us)
    book.is_what_was_told(id_)


def test_a_retry_after_its_time_goes_at_once(book: Book) -> None:
    id_ = book.create(send_at_us=time.time_ns() // 1000 - 10**6)
    book.cancelled(id_)
    book.reopened(id_)
    assert book.row(id_).next_attempt_at is None


@pytest.mark.parametrize("kind", ["mx_ok", "mx_failed", "deferred"])
def test_a_cancelled_tasks_timeline_shows_no_later_validation(book: Book, kind: str) -> None:
    id_ = book.create(send_at_us=time.time_ns() // 1000 + 3600 * 10**6)
    cancelled = book.cancelled(id_).event
    assert cancelled is not None
    task, late = pb.MailTask(id=id_, tenant=TENANT), cancelled.at_us + 1000
    verdict: dict[str, Event] = {
        "mx_ok": pb.MxOk(task=task, attempt=1, at_us=late),
        "mx_failed": pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=late),
        "deferred": pb.MailDeferred(id=id_, attempt=1, stage="validator", reason="x", at_us=late),
    }
    book.tell(id_, verdict[kind])
    with book.engine.connect() as connection:
        task_ = queries.get(connection, TENANT, id_)
    assert task_ is not None
    assert [line.kind for line in task_.timeline] == ["created", "cancelled"]
    # What is found once it is opened again is shown.
    epoch = book.reopened(id_)
    later = pb.MxOk(task=task, epoch=epoch, attempt=1, at_us=epoch * 1000 + 1)
    book.tell(id_, later)
    with book.engine.connect() as connection:
        task_ = queries.get(connection, TENANT, id_)
    assert task_ is not None
    assert [line.kind for line in task_.timeline] == ["created", "cancelled", "retried", "mx_ok"]


def test_a_deferred_task_keeps_its_attempts_and_is_not_tried_again(book: Book) -> None:
    told, untold = book.create(), book.create()
    for id_ in (told, untold):
        book.settle(book.taken(id_), "deferred", "deferred", "451 later")
        row = book.taken(id_, attempt=2)
        book.settle(row, "deferred", "deferred", "451 later", told=id_ == told)
        decision = book.cancelled(id_)
        assert (decision.task.status, decision.task.attempts) == ("cancelled", 2)
        assert not decision.task.HasField("next_attempt_at")
        assert isinstance(book.claim(id_, attempt=3), Stale)
        book.is_what_was_told(id_)


def test_a_claim_given_back_is_free_to_be_cancelled(book: Book) -> None:
    id_ = book.create()
    book.settle(book.taken(id_), "released")
    assert book.cancelled(id_).task.status == "cancelled"
    book.is_what_was_told(id_)


def test_while_it_is_being_sent_nothing_is_decided(book: Book) -> None:
    id_ = book.create()
    book.ok(id_)
    row = book.taken(id_)
    before = book.row(id_)
    verdict = book.cancel(id_)
    assert isinstance(verdict, Wait)
    assert 0 < verdict.seconds <= 60
    assert book.row(id_) == before
    assert book.outbox(id_) == [outbox.created(id_)]
    # What the sender then says is what the next Cancel answers, whether the fold has seen it or not.
    sent = book.settle(row, "sent", reply="250 ok", told=False)
    decision = book.cancelled(id_)
    assert (decision.task.status, decision.task.reply) == ("completed", "250 ok")
    assert decision.event is None
    book.events[id_].append(event_of(sent))
    book.is_what_was_told(id_)


@pytest.mark.parametrize("told", [True, False])
def test_what_the_sender_ended_is_answered_as_it_ended(book: Book, told: bool) -> None:
    for row in [book.settle(book.taken(book.create()), "failed", "rejected", "550 no", told)]:
        decision = book.cancelled(row.task_id)
        assert (decision.task.status, decision.task.reason) == (row.state, row.reason)
        assert decision.event is None
        delivery = book.delivery(row.task_id)
        assert delivery is not None
        assert delivery == row._replace(lease_until=delivery.lease_until)
        if not told:
            book.events[row.task_id].append(event_of(row))
        book.is_what_was_told(row.task_id)


def test_a_task_that_the_validator_ended_is_failed(book: Book) -> None:
    id_ = book.create()
    book.tell(id_, pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=5))
    decision = book.cancelled(id_)
    assert (decision.task.status, decision.task.reason, decision.event) == ("failed", "null_mx", None)
    book.is_what_was_told(id_)


def test_a_mail_that_may_have_gone_out_is_uncertain_and_so_told(book: Book) -> None:
    for expired in (True, False):
        id_ = book.create()
        book.ok(id_)
        row = book.taken(id_)
        if expired:
            book.expire()
        else:
            book.settle(row, "deferred", IN_DOUBT)
        decision = book.cancelled(id_)
        assert decision.event is not None
        assert (decision.task.status, decision.task.reason) == ("uncertain", IN_DOUBT)
        assert decision.task.attempts == 1
        # The sender told of it when it met the cancellation.
        assert isinstance(book.events[id_][-1], pb.MailFailed)
        assert isinstance(book.claim(id_, attempt=2), Stale)
        book.is_what_was_told(id_)
        assert book.cancelled(id_).task.status == "cancelled"
        book.is_what_was_told(id_)


def test_a_reopened_task_is_cancelled_in_its_new_epoch(book: Book) -> None:
    id_ = book.create()
    book.settle(book.taken(id_), "failed", "rejected", "550 no")
    epoch = book.reopened(id_)
    decision = book.cancelled(id_)
    assert decision.task.status == "cancelled"
    assert isinstance(book.claim(id_, epoch), Stale)
    book.is_what_was_told(id_)


def test_a_task_that_is_failed_while_its_mail_waits_is_cancelled_all_the_same(book: Book) -> None:
    """A replay found no domain any more; the earlier record still stands on a delay topic."""
    id_ = book.create()
    book.settle(book.taken(id_), "deferred", "deferred", "451 later")
    book.tell(id_, pb.MxFailed(id=id_, epoch=7, attempt=1, reason="no_such_domain", at_us=9))
    assert book.row(id_).status == "failed"
    assert book.cancelled(id_).task.status == "cancelled"
    assert isinstance(book.claim(id_, attempt=2), Stale)
    book.is_what_was_told(id_)


def test_nobody_decides_about_anothers_task(book: Book) -> None:
    id_ = book.create()
    assert book.cancel(id_, "red") is None
    assert book.cancel(bytes(16)) is None
    book.cancelled(id_)
    assert book.retry(id_, "red") is None
    assert book.retry(bytes(16)) is None


# --- Retry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "uncertain", "cancelled", "refused"])
def test_what_ended_without_its_mail_begins_anew_and_is_sent_once(book: Book, state: str) -> None:
    id_ = book.create()
    match state:
        case "cancelled":
            book.cancelled(id_)
        case "refused":
            book.tell(id_, pb.MxFailed(id=id_, attempt=1, reason="null_mx", at_us=5))
        case "failed":
            book.settle(book.taken(id_), "failed", "rejected", "550 no")
        case "uncertain":
            book.settle(book.taken(id_), "uncertain", IN_DOUBT)
    epoch = book.reopened(id_)
    assert book.kinds(id_)[-1] == "retried"
    book.is_what_was_told(id_)
    assert not isinstance(book.claim(id_), Taken), "the old record sends nothing"
    book.settle(book.taken(id_, epoch), "sent", reply="250 ok")
    assert book.row(id_).status == "completed"
    assert book.retry(id_) == NotRetryable("completed")
    assert isinstance(book.claim(id_, epoch + 1), Stored)
    book.is_what_was_told(id_)


@pytest.mark.parametrize("told", [True, False])
def test_what_was_sent_is_never_opened_again(book: Book, told: bool) -> None:
    id_ = book.create()
    row = book.settle(book.taken(id_), "uncertain", IN_DOUBT)
    # Its sender got the answer after all.
    late = book.settle(row._replace(state="sending"), "sent", reply="250 ok", told=told)
    assert book.retry(id_) == NotRetryable("completed")
    if not told:
        stored = book.delivery(id_)
        assert stored is not None
        book.events[id_].append(event_of(stored))
    assert late.state == "sent"
    book.is_what_was_told(id_)


def test_what_is_under_way_is_not_opened(book: Book) -> None:
    id_ = book.create()
    assert book.retry(id_) == NotRetryable("pending")
    book.ok(id_)
    assert book.retry(id_) == NotRetryable("processing")
    book.settle(book.taken(id_), "deferred", "deferred", "451 later")
    assert book.retry(id_) == NotRetryable("processing")


@pytest.mark.parametrize("state", ["sending", "deferred"])
def test_what_a_sender_has_is_not_opened_though_a_late_verdict_came(book: Book, state: str) -> None:
    id_ = book.create()
    book.ok(id_)
    row = book.taken(id_)
    if state == "deferred":
        book.settle(row, "deferred", "greylisted", told=False)
    book.tell(id_, pb.MxFailed(id=id_, attempt=1, reason="no_such_domain", at_us=9))
    assert book.retry(id_) == NotRetryable("processing")


def test_a_task_without_its_body_cannot_be_sent_again(book: Book) -> None:
    id_ = book.create()
    book.settle(book.taken(id_), "failed", "rejected", "550 no")
    with book.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM task_bodies WHERE task_id = %s", (id_,))
    assert book.retry(id_) == NotRetryable("failed", purged=True)
    assert book.row(id_).status == "failed"


def test_of_several_retries_at_once_one_opens_the_task(book: Book) -> None:
    id_ = book.create()
    book.cancelled(id_)
    answers = everyone(6, lambda number: book.retry(id_))
    assert sum(isinstance(answer, Retried) for answer in answers) == 1
    assert [answer for answer in answers if isinstance(answer, NotRetryable)] == [NotRetryable("pending")] * 5


def test_a_retry_whose_commit_was_not_heard_of_opens_the_task_once(book: Book) -> None:
    id_ = book.create()
    book.cancelled(id_)
    first = book.retry(id_)
    assert isinstance(first, Retried)
    second = book.retry(id_, tried=first.event.epoch)
    assert second == first
    assert len(book.outbox(id_)) == 3


def test_a_clock_that_is_behind_makes_no_earlier_epoch(book: Book) -> None:
    id_ = book.create()
    far = 1 << 41
    book.tell(id_, pb.TaskCreated(task=book.mail(id_), epoch=far, at_us=far * 1000))
    book.settle(book.taken(id_, far + 3), "failed", "rejected", "550 no")
    assert book.reopened(id_) == far + 4
    assert book.cancelled(id_).task.status == "cancelled"
    assert book.reopened(id_) == far + 6
    book.is_what_was_told(id_)


# --- races ----------------------------------------------------------------------------------------


def test_cancels_and_claims_that_race_agree(book: Book) -> None:
    """Each task is either cancelled and never taken, or taken and so answered."""
    ids = [book.create() for _ in range(120)]
    taken: set[bytes] = set()
    lock = threading.Lock()
    answers: dict[bytes, set[str]] = {id_: set() for id_ in ids}

    def send(rng: random.Random) -> None:
        left = rng.sample(ids, len(ids))
        while left:
            batch, left = left[: rng.randrange(1, 20)], left[20:]
            verdicts = book.claims.claim([Claim(id_, 0, 1, token(), "<m@x>") for id_ in batch])
            mine = [verdict.row for verdict in verdicts if isinstance(verdict, Taken)]
            with lock:
                assert taken.isdisjoint(row.task_id for row in mine)
                taken.update(row.task_id for row in mine)
            if mine:
                book.claims.settle([row._replace(state="sent", settled_at=1) for row in mine])

    def take_back(rng: random.Random) -> None:
        for id_ in rng.sample(ids, len(ids)):
            while isinstance(decision := book.cancel(id_), Wait):
                time.sleep(0.001)
            assert isinstance(decision, Cancelled)
            with lock:
                answers[id_].add(decision.task.status)

    roles = [send, send, take_back, take_back]
    everyone(len(roles), lambda number: roles[number](random.Random(number)))
    for id_ in ids:
        assert answers[id_] == {"completed" if id_ in taken else "cancelled"}
        delivery = book.delivery(id_)
        assert delivery is not None
        assert delivery.state == ("sent" if id_ in taken else "cancelled")
    assert 0 < len(taken) < len(ids), "one side won every race"


# --- as the handlers ask --------------------------------------------------------------------------


class Asking:
    """A Decider on the book's database, and what it published."""

    def __init__(self, engine: Engine) -> None:
        self.published: list[Event] = []
        self._threads = DatabaseThreads(engine)
        self.decider = Decider(self._threads, lambda batch: self.published.extend(r.event for r in batch))

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()


async def test_a_cancel_waits_for_a_mail_under_way_and_then_says_what_came_of_it(book: Book) -> None:
    done, stuck = book.create(), book.create()
    row = book.taken(done)
    book.taken(stuck)
    with Asking(book.engine) as asking:
        asked = asyncio.ensure_future(asking.decider.cancel(TENANT, done, b""))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await asyncio.to_thread(book.settle, row, "sent", reply="250 ok", told=False)
        assert (await asked).status == "completed"
        began = time.monotonic()
        with pytest.raises(StatusError) as caught:
            await asking.decider.cancel(TENANT, stuck, b"")
        assert 3 < time.monotonic() - began < 8
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        info, again = caught.value.details
        assert info.reason == "BEING_SENT"  # type: ignore[attr-defined]
        assert again.retry_delay.ToMilliseconds() > 0  # type: ignore[attr-defined]
        assert asking.published == []
        assert book.outbox(stuck) == [outbox.created(stuck)]


async def test_what_is_decided_is_published_at_once(book: Book) -> None:
    id_ = book.create()
    with Asking(book.engine) as asking:
        assert (await asking.decider.cancel(TENANT, id_, b"")).status == "cancelled"
        assert (await asking.decider.cancel(TENANT, id_, b"")).status == "cancelled"
        assert (await asking.decider.retry(TENANT, id_, b"")).status == "pending"
        with pytest.raises(StatusError) as caught:
            await asking.decider.retry(TENANT, id_, b"")
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert [type(event) for event in asking.published] == [pb.TaskCancelled, pb.TaskCreated]
        assert {outbox.row_of(event) for event in asking.published} < set(book.outbox(id_))  # type: ignore[arg-type]
        for ask in (asking.decider.cancel, asking.decider.retry):
            with pytest.raises(StatusError) as caught:
                await ask("red", id_, b"")
            assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_without_the_database_the_answer_is_unavailable(book: Book) -> None:
    id_ = book.create()
    engine = make_engine(book.engine.url.set(port=free_port()))
    with Asking(engine) as asking:
        for ask in (asking.decider.cancel, asking.decider.retry):
            began = time.monotonic()
            with pytest.raises(StatusError) as caught:
                await ask(TENANT, id_, b"")
            assert time.monotonic() - began < 6
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            assert any(hasattr(detail, "retry_delay") for detail in caught.value.details)


# --- an uncertain task is closed ------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_an_uncertain_task_is_cancelled_and_its_timeline_keeps_the_doubt(book: Book, told: bool) -> None:
    id_ = book.create()
    row = book.settle(book.taken(id_), "uncertain", IN_DOUBT, told=told)
    decision = book.cancelled(id_)
    assert decision.event is not None
    assert (decision.task.status, decision.task.attempts) == ("cancelled", 1)
    assert (decision.event.in_doubt, timeline_entry(decision.event).detail) == (
        True,
        "the mail may have gone out",
    )
    if not told:
        # Its sender died before it told of the doubt.
        book.swept(id_, decision.event)
        assert event_of(row) in book.events[id_]
    book.is_what_was_told(id_)
    assert not isinstance(book.claim(id_), Taken)
    assert book.cancelled(id_).event is None
    # Opened again it is sent, and once more it cannot be promised that it was not.
    epoch = book.reopened(id_)
    again = book.taken(id_, epoch)
    assert again.takeovers == 1
    book.settle(again, "deferred", "deferred", "451 later")
    assert book.cancelled(id_).task.status == "uncertain"


def test_a_cancel_whose_commit_was_not_heard_of_does_not_close_the_doubt_that_it_found(book: Book) -> None:
    id_ = book.create()
    book.settle(book.taken(id_), "deferred", IN_DOUBT)
    owner, now_us = token(), time.time_ns() // 1000
    for _ in range(2):
        answered = transaction(book.engine, lambda c: cancel(c, TENANT, id_, owner, now_us))
        assert isinstance(answered, Cancelled)
        assert answered.task.status == "uncertain"


@pytest.mark.parametrize("told", [True, False])
def test_a_mail_that_an_operator_found_is_never_sent_again(book: Book, told: bool) -> None:
    id_ = book.create()
    row = book.settle(book.taken(id_), "uncertain", IN_DOUBT, told=told)
    decision = book.resolved(id_, sent=True)
    assert (decision.task.status, decision.task.message_id) == ("completed", row.message_id)
    book.is_what_was_told(id_)
    assert (book.kinds(id_)[-1], timeline_entry(decision.event).stage) == ("sent", "api")  # type: ignore[arg-type]
    for epoch in (0, decision.event.epoch + 1):  # type: ignore[union-attr]
        stored = book.claim(id_, epoch, attempt=2)
        assert isinstance(stored, Stored)
        assert encode(event_of(stored.row), "x").value == encode(decision.event, "x").value  # type: ignore[arg-type]
    assert book.retry(id_) == NotRetryable("completed")
    assert book.cancelled(id_).task.status == "completed"
    # Said twice, it is recorded once; it is not taken back.
    assert book.resolve(id_, sent=True) == Resolved(decision.task, None)
    assert book.resolve(id_, sent=False) == NotResolvable("completed")


def test_a_mail_that_was_not_sent_has_failed_and_goes_by_a_retry(book: Book) -> None:
    id_ = book.create()
    row = book.settle(book.taken(id_), "uncertain", IN_DOUBT)
    decision = book.resolved(id_, sent=False)
    assert (decision.task.status, decision.task.reason) == ("failed", NOT_SENT)
    book.is_what_was_told(id_)
    assert isinstance(book.claim(id_, attempt=2), Stale)
    assert book.resolve(id_, sent=False) == Resolved(decision.task, None)
    assert book.resolve(id_, sent=True) == NotResolvable("failed")
    again = book.taken(id_, book.reopened(id_))
    assert (again.message_id, again.takeovers) == (row.message_id, 0)
    book.settle(again, "sent", reply="250 ok")
    book.is_what_was_told(id_)


def test_only_an_uncertain_task_is_resolved(book: Book) -> None:
    id_ = book.create()
    assert book.resolve(id_, sent=True) == NotResolvable("pending")
    book.settle(book.taken(id_), "failed", "rejected", "550 no")
    assert book.resolve(id_, sent=True) == book.resolve(id_, sent=False) == NotResolvable("failed")
    assert book.resolve(id_, True, "red") is None
    assert book.resolve(bytes(16), sent=True) is None


def test_an_uncertain_task_whose_delivery_was_lost_is_resolved(book: Book) -> None:
    id_ = book.create()
    book.settle(book.taken(id_), "uncertain", IN_DOUBT)
    with book.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM deliveries WHERE task_id = %s", (id_,))
    decision = book.resolve(id_, sent=True)
    assert isinstance(decision, Resolved)
    assert decision.task.status == "completed"
    assert isinstance(book.claim(id_), Stored)
