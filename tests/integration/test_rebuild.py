"""`postroad rebuild` on real servers: lost rows come back, and no row is lost."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2 as pb
from services.api import outbox
from services.api.uuid7 import IdGenerator
from services.common import migrations
from services.common.config import Settings
from services.common.database.bulk import execute_rows
from services.common.database.transactions import transaction
from services.common.deliveries.decide import IN_DOUBT, Claim, Delivery
from services.common.deliveries.rows import COLUMNS, store_rows
from services.common.events import Event, encode, event_key
from services.common.fold import delta
from services.common.kafka import admin as kafka_admin
from services.common.kafka.topics import EVENT_TOPICS
from services.common.operations.rebuild import run, swap_tables
from services.common.operations.rebuild.report import RebuildReport
from services.common.operations.rebuild.run import RebuildRunning, rebuild
from services.common.operations.rebuild.shadow_table import TASKS, create_tables
from services.common.operations.rebuild.swap_tables import swap
from services.common.stages import all_topics
from services.common.taskstore import body_of, insert_bodies, insert_events, upsert
from services.common.timeline import timeline_row
from services.sender.claims import Claims
from services.status.topic_ids import note_topic_ids
from tests import forked
from tests.api_process import eventually
from tests.forms import by_form
from tests.groups import Offsets
from tests.stack import Infra

NOW_US = time.time_ns() // 1000
PARTITIONS = 2


class Silent:
    """A RebuildProgress that shows nothing."""

    def total(self, events: int) -> None: ...

    def advance(self, events: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class Pipeline:
    """One installation: events go to the topics and into the tables, as the services put them there."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self.generator = IdGenerator()
        self._number = count()
        self._producer = Producer({"bootstrap.servers": settings.kafka_bootstrap, "linger.ms": 20})

    def task(self, number: int) -> pb.MailTask:
        id_, at = self.generator.new()
        task = pb.MailTask(
            id=id_,
            tenant="default",
            email=f"user{number}@example.test",
            domain="example.test",
            subject=f"Ünïcode {number} ",
            body=f"body {number}",
            created_at_us=at,
        )
        if number % 2:
            task.idempotency_key, task.request_hash = f"key {next(self._number)} ", bytes(32)
            task.labels.update({"team": "blue", "a": "é"})
        return task

    def record(self, tasks: Sequence[pb.MailTask], then: Callable[[Connection], None] | None = None) -> None:
        """Record tasks as the api does."""

        def work(connection: Connection) -> None:
            upsert(connection, [delta(created(task)) for task in tasks])
            insert_bodies(connection, [body_of(task) for task in tasks])
            outbox.put(connection, [outbox.created(task.id) for task in tasks])
            if then is not None:
                then(connection)

        transaction(self.engine, work)

    def publish(self, events: Sequence[Event]) -> None:
        for event in events:
            record = encode(event, "test")
            name = self.settings.topic_prefix + record.topic
            self._producer.produce(name, key=record.key, value=record.value)
        assert self._producer.flush(20) == 0

    def unlist(self, tasks: Sequence[pb.MailTask]) -> None:
        transaction(self.engine, lambda c: outbox.delete(c, [outbox.created(task.id) for task in tasks]))

    def fold(self, events: Sequence[Event]) -> None:
        """Fold events as the status stage does."""

        def work(connection: Connection) -> None:
            upsert(connection, [delta(event) for event in events])
            insert_events(connection, [timeline_row(event) for event in events])

        transaction(self.engine, work)

    def run_tasks(self, many: int) -> list[list[Event]]:
        """Bring so many tasks to ends of every kind. Returns each one's events."""
        tasks = [self.task(number) for number in range(many)]
        self.record(tasks)
        histories = [history(number, task) for number, task in enumerate(tasks)]
        events = [event for one in histories for event in one]
        self.publish(events)
        self.unlist(tasks)
        self.fold(events)
        settled = [row for one in histories if (row := delivery(one)) is not None]
        transaction(self.engine, lambda connection: store_rows(connection, settled))
        return histories

    def rebuild(self, swap_in: bool = True) -> RebuildReport:
        return rebuild(self.settings, swap_in, Silent())

    def rows(self, query: str) -> list[Any]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]

    def do(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def dump(self) -> dict[str, list[Any]]:
        return {
            table: self.rows(f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("tasks", "task_events")
        }

    def tables(self) -> set[str]:
        return {name for (name,) in self.rows("SHOW TABLES")}


def created(task: pb.MailTask, epoch: int = 0) -> pb.TaskCreated:
    return pb.TaskCreated(task=task, epoch=epoch, at_us=epoch * 1000 or task.created_at_us)


def first(events: Sequence[Event]) -> pb.MailTask:
    assert isinstance(events[0], pb.TaskCreated)
    return events[0].task


def history(number: int, task: pb.MailTask) -> list[Event]:
    at = task.created_at_us
    mail: dict[str, Any] = {"id": task.id, "message_id": f"<{task.id.hex()}@x>", "relay": "relay:25"}
    events: list[Event] = [created(task)]
    if number % 8 == 0:
        return events
    if number % 8 == 1:
        return [*events, pb.MxFailed(id=task.id, attempt=1, reason="null_mx", at_us=at + 1)]
    events.append(pb.MxOk(task=task, attempt=1, at_us=at + 2))
    sent = pb.MailSent(attempt=2, reply="250 ok ", at_us=at + 9, **mail)
    deferred = pb.MailDeferred(
        stage="sender", attempt=1, reason="deferred", reply="451 later", at_us=at + 3,
        next_attempt_at_us=at + 8, **mail,
    )  # fmt: skip
    match number % 8:
        case 2:
            events.append(sent)
        case 3:
            events += [deferred, sent]
        case 4:
            events.append(pb.MailFailed(attempt=1, reason="rejected", reply="550 no", at_us=at + 4, **mail))
        case 5:
            events += [deferred, pb.TaskCancelled(id=task.id, epoch=at // 1000, attempts=1, at_us=at + 5)]
        case 6:
            deferred.reason, deferred.in_doubt = IN_DOUBT, True
            events.append(deferred)
        case 7:
            epoch = at // 1000 + 5
            failed = pb.MailFailed(attempt=1, reason="rejected", at_us=at + 4, **mail)
            events += [
                failed,
                created(task, epoch),
                pb.MxOk(task=task, epoch=epoch, attempt=1, at_us=at + 9000),
            ]
    return events


def delivery(events: Sequence[Event]) -> Delivery | None:
    """Return the row in `deliveries` after the last of these events."""
    row = None
    for event in events:
        state = {
            pb.MailSent: "sent",
            pb.MxFailed: "failed",
            pb.MailFailed: "failed",
            pb.MailDeferred: "deferred",
            pb.TaskCancelled: "cancelled",
        }.get(type(event))
        if state is not None:
            row = Delivery(
                event.id,  # type: ignore[union-attr]
                state,  # type: ignore[arg-type]
                event.epoch,
                getattr(event, "attempt", 1),
                0,
                b"o" * 16,
                datetime(2026, 1, 1),
                event.at_us,
                getattr(event, "next_attempt_at_us", 0),
                getattr(event, "reason", ""),
                getattr(event, "reply", ""),
                getattr(event, "relay", ""),
                getattr(event, "message_id", ""),
            )
    return row


@pytest.fixture
def pipeline(infra: Infra, server: Infra, database_url: str, engine: Engine) -> Pipeline:
    settings = Settings(
        kafka_bootstrap=infra.bootstrap,
        database_url=server.as_user("operator", database_url),
        topic_prefix=infra.topic_prefix(),
        partitions=PARTITIONS,
    )
    create_topics(settings)
    return Pipeline(settings, engine)


def create_topics(settings: Settings) -> set[str]:
    """Create the absent event topics: a rebuild reads no others. Return their names."""
    names = {settings.topic_prefix + topic for topic in EVENT_TOPICS}
    topics = [topic for topic in all_topics(settings) if topic.name in names]
    return set(kafka_admin.apply(settings, topics).created)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that stays needs no long look: no stage is behind."""
    monkeypatch.setattr(run, "_SETTLE", 0.1)


def test_a_dropped_table_is_rebuilt_once_it_is_created(pipeline: Pipeline, database_url: str) -> None:
    pipeline.run_tasks(8)
    before = pipeline.dump()
    pipeline.do("DROP TABLE tasks")
    assert migrations.missing_tables(database_url) == ["tasks"]
    migrations.create_tables(database_url, ["tasks"])
    report = pipeline.rebuild()
    assert (report.swapped, report.missing) == (True, 8)
    assert pipeline.dump() == before


def test_emptied_tables_are_rebuilt_row_for_row(pipeline: Pipeline) -> None:
    many = by_form(240, 800)
    pipeline.run_tasks(many)
    before, bodies = pipeline.dump(), pipeline.rows("SELECT * FROM task_bodies ORDER BY 1")
    assert len(before["tasks"]) == len(bodies) == many
    pipeline.do("TRUNCATE tasks", "DELETE FROM task_events", "TRUNCATE task_bodies")
    report = pipeline.rebuild()
    assert report.swapped
    assert not report.undecodable
    assert not report.refused
    assert (report.tasks, report.missing, report.lines_missing) == (many, many, len(before["task_events"]))
    assert (report.differing, report.extra, report.recorded, report.older) == (0, 0, 0, 0)
    assert pipeline.dump() == before
    assert pipeline.rows("SELECT * FROM task_bodies ORDER BY 1") == bodies
    again = pipeline.rebuild()
    assert again.equal
    assert not again.swapped
    assert again.tasks == many
    assert not [name for name in pipeline.tables() if "rebuild" in name]
    indexes = (
        "SELECT index_name, column_name FROM information_schema.statistics WHERE table_schema = DATABASE()"
    )
    assert len(pipeline.rows(indexes + " AND table_name = 'tasks'")) > 4


def test_a_corrupted_row_is_found_and_mended_with_yes(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(16)
    before = pipeline.dump()
    victim = first(histories[2]).id.hex()
    pipeline.do(
        f"UPDATE tasks SET subject = CONCAT(subject, ' '), status = 'failed' WHERE id = 0x{victim}",
        f"UPDATE task_events SET reply = '250 OK ' WHERE task_id = 0x{victim} AND kind = 'sent'",
        f"DELETE FROM tasks WHERE id = 0x{first(histories[3]).id.hex()}",
    )
    corrupted = pipeline.dump()
    found = pipeline.rebuild(swap_in=False)
    assert (found.swapped, found.equal) == (False, False)
    assert (found.differing, found.missing, found.lines_differing) == (1, 1, 1)
    found_columns = {(s.table, s.task.hex, s.kind): set(s.columns) for s in found.samples}
    assert found_columns["tasks", victim, "differs"] == {"subject", "status"}
    assert found_columns["task_events", victim, "differs"] == {"reply"}
    assert pipeline.dump() == corrupted
    mended = pipeline.rebuild()
    assert (mended.differing, mended.missing, mended.swapped) == (1, 1, True)
    assert pipeline.dump() == before


def test_unpublished_tasks_keep_their_rows(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(16)
    waiting = [pipeline.task(number) for number in range(100, 104)]
    pipeline.record(waiting)
    # A failed task is reopened, and its event is not published.
    reopened = first(histories[4])
    again = created(reopened, reopened.created_at_us // 1000 + 9)
    # One is scheduled.
    later = pipeline.task(200)
    scheduled = created(later)
    scheduled.send_at_us = later.created_at_us + 3_600_000_000
    with pipeline.engine.begin() as connection:
        upsert(connection, [delta(again), delta(scheduled)])
        outbox.put(connection, [outbox.created(later.id)])
        insert_events(connection, [timeline_row(again)])
        outbox.put(connection, [outbox.created(reopened.id, again.epoch)])
    before = pipeline.dump()
    assert pipeline.rebuild(swap_in=False).equal
    pipeline.do(f"UPDATE tasks SET recipient = 'x' WHERE id = 0x{first(histories[2]).id.hex()}")
    report = pipeline.rebuild()
    assert (report.recorded, report.differing, report.missing, report.extra) == (6, 1, 0, 0)
    assert report.swapped
    assert pipeline.dump() == before


def test_tasks_older_than_the_topics_keep_their_rows(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(80)
    cut = 60
    before = pipeline.dump()
    admin = AdminClient({"bootstrap.servers": pipeline.settings.kafka_bootstrap})
    deleted = [
        TopicPartition(f"{pipeline.settings.topic_prefix}{topic}", number, 10)
        for topic in ("task.created", "mx.ok")
        for number in range(PARTITIONS)
    ]
    for answer in admin.delete_records(deleted).values():
        answer.result(10)
    report = pipeline.rebuild(swap_in=False)
    assert report.equal
    assert report.older > 0
    assert report.extra == 0
    # A row of an old task is mended where the topics know more.
    old, lost = first(histories[2]).id.hex(), first(histories[cut]).id.hex()
    pipeline.do(
        f"UPDATE tasks SET status = 'failed' WHERE id = 0x{old}", f"DELETE FROM tasks WHERE id = 0x{lost}"
    )
    report = pipeline.rebuild()
    assert (report.differing, report.missing, report.swapped) == (1, 1, True)
    assert pipeline.dump() == before


def test_a_row_that_no_topic_explains_is_counted_and_kept(pipeline: Pipeline) -> None:
    pipeline.run_tasks(16)
    alone = pipeline.task(99)
    pipeline.fold([created(alone)])
    pipeline.do("UPDATE tasks SET subject = 'wrong' LIMIT 1")
    report = pipeline.rebuild()
    assert (report.extra, report.lines_extra, report.differing, report.swapped) == (1, 1, 1, True)
    assert pipeline.rows(f"SELECT status FROM tasks WHERE id = 0x{alone.id.hex()}") == [("pending",)]
    assert len(pipeline.rows(f"SELECT 1 FROM task_events WHERE task_id = 0x{alone.id.hex()}")) == 1


def test_two_tasks_under_one_key_both_have_a_row(pipeline: Pipeline) -> None:
    one, other = pipeline.task(1), pipeline.task(1)
    other.idempotency_key = one.idempotency_key
    pipeline.publish([created(one), created(other), pb.MailSent(id=other.id, attempt=1, at_us=NOW_US)])
    pipeline.fold([created(one), created(other), pb.MailSent(id=other.id, attempt=1, at_us=NOW_US)])
    assert pipeline.rebuild().swapped
    rows = pipeline.rows("SELECT recipient, idempotency_key IS NULL FROM tasks")
    assert [row[0] for row in rows] == [one.email] * 2
    assert sorted(row[1] for row in rows) == [0, 1]
    assert pipeline.rebuild().equal


def test_purged_bodies_stay_purged(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(16)
    pipeline.do("TRUNCATE task_bodies")
    settings = pipeline.settings.model_copy(update={"body_retention": 1})
    # All are older than the retention, but only bodies of settled tasks are purged.
    time.sleep(1.1)
    assert rebuild(settings, False, Silent()).bodies == 6
    assert rebuild(settings, True, Silent()).bodies == 6
    kept = {bytes(id_) for (id_,) in pipeline.rows("SELECT task_id FROM task_bodies")}
    assert kept == {first(events).id for number, events in enumerate(histories) if number % 8 in (0, 6, 7)}


def test_bodies_of_settled_tasks_stay_purged_where_the_retention_is_not_given(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(16)
    assert "body_retention" not in pipeline.settings.model_fields_set
    pipeline.do("TRUNCATE task_bodies")
    report = rebuild(pipeline.settings, False, Silent())
    assert report.bodies == 6
    assert not report.equal
    assert rebuild(pipeline.settings, True, Silent()).bodies == 6
    kept = {bytes(id_) for (id_,) in pipeline.rows("SELECT task_id FROM task_bodies")}
    working = {first(events).id for number, events in enumerate(histories) if number % 8 in (0, 6, 7)}
    assert kept == working
    assert rebuild(pipeline.settings, False, Silent()).equal
    # A lost or wrongly settled row says nothing about a body.
    victims = [first(histories[number]).id for number in (0, 2)]
    pipeline.do(
        "TRUNCATE task_bodies",
        f"UPDATE tasks SET status = 'failed' WHERE id = 0x{victims[0].hex()}",
        f"DELETE FROM tasks WHERE id = 0x{victims[1].hex()}",
    )
    assert rebuild(pipeline.settings, True, Silent()).bodies == 7
    kept = {bytes(id_) for (id_,) in pipeline.rows("SELECT task_id FROM task_bodies")}
    assert kept == working | {victims[1]}


def test_bodies_of_settled_tasks_come_back_where_the_retention_is_given(pipeline: Pipeline) -> None:
    pipeline.run_tasks(8)
    for seconds in (0, 30 * 86400):
        pipeline.do("TRUNCATE task_bodies")
        settings = pipeline.settings.model_copy(update={"body_retention": seconds})
        assert rebuild(settings, True, Silent()).bodies == 8
        assert pipeline.rows("SELECT COUNT(*) FROM task_bodies") == [(8,)]


# --- topics that lost their records ----------------------------------------------------------------


def recreate(settings: Settings, *topics: str) -> None:
    """Delete these topics and create empty ones."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    names = {settings.topic_prefix + topic for topic in topics}
    for answer in admin.delete_topics(list(names)).values():
        answer.result(10)
    deadline = time.monotonic() + 20
    while names & admin.list_topics(timeout=5).topics.keys():
        assert time.monotonic() < deadline
    assert create_topics(settings) == names


def truncate(settings: Settings, *topics: str) -> None:
    """Delete the first record of each partition of these topics, if it has one."""
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    with Offsets(settings.kafka_bootstrap, f"{settings.topic_prefix}truncating") as group:
        bounds = group.bounds(group.partitions(settings.topic_prefix + topic for topic in topics))
    starts = [TopicPartition(*at, low + 1) for at, (low, high) in bounds.items() if high > low]
    assert starts
    for answer in admin.delete_records(starts).values():
        answer.result(10)


@pytest.mark.parametrize("topic", by_form(("task.created", "mail.sent"), EVENT_TOPICS))
def test_a_recreated_topic_takes_nothing_from_the_rows(pipeline: Pipeline, topic: str) -> None:
    histories = pipeline.run_tasks(24)
    before, deliveries = pipeline.dump(), pipeline.rows("SELECT * FROM deliveries ORDER BY 1")
    lost = sum(event_key(event).startswith(f"{topic}:") for events in histories for event in events)
    recreate(pipeline.settings, topic)
    new = pipeline.task(0)
    pipeline.publish([created(new)])
    report = pipeline.rebuild()
    assert report.swapped
    assert {
        table: [row for row in rows if row[0] != new.id] for table, rows in pipeline.dump().items()
    } == before
    assert pipeline.rows("SELECT * FROM deliveries ORDER BY 1") == deliveries
    assert (report.missing, report.differing) == (1, 0)
    assert [(gone.topic, gone.cause, gone.records) for gone in report.gone] == [(topic, "lacks", lost)]
    assert pipeline.rebuild(swap_in=False).equal


def test_recreated_topics_take_nothing_from_the_rows(pipeline: Pipeline) -> None:
    pipeline.run_tasks(24)
    before = pipeline.dump()
    recreate(pipeline.settings, *EVENT_TOPICS)
    new = pipeline.task(0)
    pipeline.publish([created(new)])
    report = pipeline.rebuild()
    assert (report.swapped, report.missing, report.extra, report.differing) == (True, 1, 24, 0)
    assert {gone.topic for gone in report.gone} == set(EVENT_TOPICS)
    assert {
        table: [row for row in rows if row[0] != new.id] for table, rows in pipeline.dump().items()
    } == before


def test_rows_stay_where_the_timelines_are_lost_too(pipeline: Pipeline) -> None:
    pipeline.run_tasks(24)
    before = pipeline.dump()["tasks"]
    recreate(pipeline.settings, "task.created", "mx.ok", "mail.sent", "mail.failed")
    pipeline.do("TRUNCATE task_events")
    report = pipeline.rebuild()
    assert pipeline.dump()["tasks"] == before
    assert (report.swapped, report.kept) == (True, 12)


def test_a_row_is_mended_whose_version_alone_is_too_high(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(24)
    before = pipeline.dump()
    id_ = first(histories[2]).id.hex()
    pipeline.do(f"UPDATE tasks SET version = version + 1, status = 'failed' WHERE id = 0x{id_}")
    report = pipeline.rebuild()
    assert (report.differing, report.kept, report.gone) == (1, 0, [])
    assert pipeline.dump() == before


def test_a_contradicted_row_is_mended_even_with_a_recreated_topic(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(24)
    before = pipeline.dump()
    recreate(pipeline.settings, "task.created")
    pipeline.do(f"UPDATE tasks SET subject = 'wrong' WHERE id = 0x{first(histories[2]).id.hex()}")
    assert pipeline.rebuild().differing == 1
    assert pipeline.dump() == before


def test_the_task_that_has_an_idempotency_key_keeps_it(pipeline: Pipeline) -> None:
    # Records of one partition are read in turn. The first task read would get the key.
    one, other = (pipeline.task(1) for _ in range(2))
    other.idempotency_key = one.idempotency_key
    pipeline.publish([created(one)])
    pipeline.publish([created(other)])
    for owner in (one, other):
        pipeline.do("DELETE FROM tasks", "DELETE FROM task_events")
        pipeline.fold([created(owner)])
        pipeline.rebuild()
        keys = dict(pipeline.rows("SELECT id, idempotency_key FROM tasks"))
        assert keys == {owner.id: owner.idempotency_key.encode(), (other if owner is one else one).id: None}
        assert pipeline.rebuild(swap_in=False).equal


def test_a_recreated_topic_is_recognised_by_its_id_alone(pipeline: Pipeline) -> None:
    asyncio.run(note_topic_ids(pipeline.engine, pipeline.settings))
    assert pipeline.rebuild(swap_in=False).gone == []
    recreate(pipeline.settings, "mx.ok")
    for _ in range(2):
        [gone] = pipeline.rebuild(swap_in=False).gone
        assert (gone.topic, gone.cause, gone.records) == ("mx.ok", "recreated", 0)


def test_a_topic_that_was_truncated_is_named(pipeline: Pipeline) -> None:
    pipeline.run_tasks(24)
    before = pipeline.dump()
    truncate(pipeline.settings, "mail.sent")
    report = pipeline.rebuild()
    assert report.equal
    assert report.older > 0
    assert [(gone.topic, gone.cause) for gone in report.gone] == [("mail.sent", "truncated")]
    assert pipeline.dump() == before


def test_a_task_without_its_task_created_is_counted(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(8)
    recreate(pipeline.settings, "task.created")
    pipeline.do(f"DELETE FROM tasks WHERE id = 0x{first(histories[1]).id.hex()}")
    report = pipeline.rebuild(swap_in=False)
    assert (report.missing, report.partial) == (1, 1)


def test_a_mail_that_a_timeline_says_was_sent_is_not_sent_again(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(24)
    recreate(pipeline.settings, "mail.sent")
    pipeline.do("TRUNCATE deliveries")
    pipeline.rebuild()
    states = dict(pipeline.rows("SELECT task_id, state FROM deliveries"))
    sent = [first(events).id for number, events in enumerate(histories) if number % 8 in (2, 3)]
    assert {states.get(id_) for id_ in sent} == {"sent"}


def test_the_command_says_what_it_cannot_rebuild(pipeline: Pipeline) -> None:
    pipeline.run_tasks(8)
    recreate(pipeline.settings, "task.created")
    environment = {
        "POSTROAD_KAFKA_BOOTSTRAP": pipeline.settings.kafka_bootstrap,
        "POSTROAD_DATABASE_URL": pipeline.settings.database_url.get_secret_value(),
        "POSTROAD_TOPIC_PREFIX": pipeline.settings.topic_prefix,
    }
    code, out, err = forked.run("services.cli", ["rebuild"], os.environ | environment)
    assert code == 0, err
    assert re.search(r"TOPIC +CAUSE +RECORDS +SINCE\ntask.created +lacks +9$", out, re.MULTILINE), out
    assert "The topics do not hold everything that the tables know" in err


# --- deliveries ------------------------------------------------------------------------------------


def test_after_a_total_loss_no_mail_is_sent_again(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(16)
    before = pipeline.dump()
    pipeline.do(
        *(f"TRUNCATE {table}" for table in ("tasks", "task_events", "task_bodies", "outbox", "deliveries"))
    )
    report = pipeline.rebuild()
    assert pipeline.dump() == before
    states = dict(pipeline.rows("SELECT task_id, state FROM deliveries"))
    expected = ["", "failed", "sent", "sent", "failed", "cancelled", "deferred", "failed"]
    for number, events in enumerate(histories):
        assert states.get(first(events).id, "") == expected[number % 8]
    assert report.deliveries == len(states) == 14
    claims = Claims(pipeline.engine, 20, hold=False)
    sent = [first(events).id for number, events in enumerate(histories) if number % 8 in (2, 3)]
    requests = [Claim(id_, NOW_US // 1000, 9, os.urandom(16), "<again@x>") for id_ in sent]
    assert {type(answer).__name__ for answer in claims.claim(requests)} == {"Settled"}


def test_a_present_delivery_stays_unless_the_mail_was_sent(pipeline: Pipeline) -> None:
    histories = pipeline.run_tasks(8)
    ids = [first(events).id for events in histories]

    def row(id_: bytes, state: Any) -> Delivery:
        lease = pipeline.rows("SELECT UTC_TIMESTAMP(6)")[0][0]
        return Delivery(id_, state, 0, 1, 0, b"o" * 16, lease, 5, 0, "mine", "", "", "<mine@x>")

    # The second row comes from a backup: its mail was sent since.
    there = [row(ids[4], "deferred"), row(ids[2], "deferred")]
    pipeline.do("TRUNCATE deliveries")
    with pipeline.engine.begin() as connection:
        execute_rows(connection, f"INSERT INTO deliveries ({COLUMNS}) VALUES", there)
    query = "SELECT task_id, state, owner FROM deliveries"
    assert pipeline.rebuild(swap_in=False).deliveries == 6
    assert len(pipeline.rows(query)) == 2
    assert pipeline.rebuild().deliveries == 6
    found = {bytes(id_): (state, bytes(owner)) for id_, state, owner in pipeline.rows(query)}
    assert found[ids[4]] == ("deferred", b"o" * 16)
    assert found[ids[2]] == ("sent", bytes(16))
    assert len(found) == 7
    assert pipeline.rebuild().equal


# --- while the services run ------------------------------------------------------------------------


def test_no_task_is_lost_while_the_services_run(pipeline: Pipeline) -> None:
    """Each task is in `tasks` from the moment that it is recorded, during a swap too."""
    stop = threading.Event()
    trouble: list[object] = []
    recorded: list[pb.MailTask] = []
    late: list[tuple[list[pb.MailTask], list[Event]]] = []

    def api() -> None:
        number = 0
        while not stop.is_set():
            tasks = [pipeline.task(number + more) for more in range(5)]
            number += 5
            pipeline.record(tasks)
            recorded.extend(tasks)
            events = [event for n, task in enumerate(tasks) for event in history(n + 2, task)]
            if number % 20:
                pipeline.publish(events)
                pipeline.unlist(tasks)
                late.append((tasks, events))
            time.sleep(0.02)

    def status() -> None:
        done = 0
        while api_thread.is_alive() or done < len(late):
            if done < len(late):
                pipeline.fold(late[done][1])
                done += 1
            else:
                time.sleep(0.002)

    def reader() -> None:
        while not stop.is_set():
            if recorded:
                id_ = recorded[-1].id
                if not pipeline.rows(f"SELECT 1 FROM tasks WHERE id = 0x{id_.hex()}"):
                    trouble.append(id_)
            time.sleep(0.001)

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def go() -> None:
            try:
                work()
            except BaseException as error:
                trouble.append(error)
                raise

        thread = threading.Thread(target=go)
        thread.start()
        return thread

    api_thread = guarded(api)
    threads = [api_thread, guarded(status), guarded(reader)]
    try:
        eventually(lambda: trouble or len(recorded) > 20)
        begun = len(recorded)
        for _ in range(by_form(2, 4)):
            pipeline.do("UPDATE tasks SET subject = 'wrong' ORDER BY id LIMIT 1")
            pipeline.rebuild()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert trouble == []
    assert len(recorded) > begun
    assert pipeline.rows("SELECT COUNT(*) FROM tasks") == [(len(recorded),)]
    report = pipeline.rebuild(swap_in=False)
    assert (report.missing, report.differing, report.extra) == (0, 0, 0), report
    assert (report.lines_missing, report.lines_differing, report.lines_extra) == (0, 0, 0), report


def test_a_failed_swap_changes_nothing(pipeline: Pipeline) -> None:
    pipeline.run_tasks(16)
    before = pipeline.dump()
    transaction(pipeline.engine, create_tables)

    def fail(connection: Connection) -> None:
        connection.exec_driver_sql("DELETE FROM tasks_rebuild")
        raise RuntimeError("Kafka is away")

    with pytest.raises(RuntimeError, match="Kafka is away"):
        swap(pipeline.engine, TASKS, fail)
    assert pipeline.dump() == before
    pipeline.run_tasks(8)
    assert pipeline.rebuild(swap_in=False).equal


def test_a_swap_waits_for_a_long_reader_and_gives_up(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run_tasks(8)
    monkeypatch.setattr(swap_tables, "_TRIES", 2)
    monkeypatch.setattr(swap_tables, "_LOCK_WAIT", 1)
    transaction(pipeline.engine, create_tables)
    with pipeline.engine.begin() as reader:
        reader.exec_driver_sql("SELECT COUNT(*) FROM tasks")
        with pytest.raises(swap_tables.TableBusy):
            swap(pipeline.engine, TASKS, lambda connection: None)
        # The abandoned swap holds up no writer.
        assert len(pipeline.rows("SELECT 1 FROM tasks")) == 8


def test_only_one_rebuild_runs_at_a_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    fold = run._Rebuild.fold

    def slow(self: Any) -> None:
        entered.set()
        assert leave.wait(30)
        fold(self)

    monkeypatch.setattr(run._Rebuild, "fold", slow)
    first = threading.Thread(target=pipeline.rebuild)
    first.start()
    try:
        assert entered.wait(30)
        with pytest.raises(RebuildRunning):
            pipeline.rebuild()
    finally:
        leave.set()
        first.join()


def test_a_killed_rebuild_leaves_the_tables_and_can_be_repeated(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.run_tasks(by_form(160, 4000))
    before = pipeline.dump()
    pipeline.do("DELETE FROM tasks LIMIT 20")
    less = pipeline.dump()
    environment = os.environ | {
        "POSTROAD_KAFKA_BOOTSTRAP": pipeline.settings.kafka_bootstrap,
        "POSTROAD_DATABASE_URL": pipeline.settings.database_url.get_secret_value(),
        "POSTROAD_TOPIC_PREFIX": pipeline.settings.topic_prefix,
    }
    command = ("rebuild", "--yes", "-o", "json")
    out, err = str(tmp_path / "stdout"), str(tmp_path / "stderr")
    killed = forked.Process("services.cli", command, environment, (os.devnull, out, err))
    eventually(
        lambda: "tasks_rebuild" in pipeline.tables() and pipeline.rows("SELECT 1 FROM tasks_rebuild LIMIT 1"),
        60,
    )
    # Rows differ, so that it looks again for some seconds before it swaps.
    assert killed.poll() is None
    killed.kill()
    killed.wait(20)
    assert pipeline.dump() == less
    assert "tasks_rebuild" in pipeline.tables()
    code, out, err = forked.run("services.cli", command, environment)
    assert code == 0, err
    assert '"missing": 20' in out
    assert pipeline.dump() == before
    assert not [name for name in pipeline.tables() if "rebuild" in name]


def test_garbage_on_the_topics_is_counted(pipeline: Pipeline) -> None:
    pipeline.run_tasks(8)
    producer = Producer({"bootstrap.servers": pipeline.settings.kafka_bootstrap})
    for topic in EVENT_TOPICS:
        producer.produce(pipeline.settings.topic_prefix + topic, b"\xff\xff\xff", b"garbage")
        producer.produce(pipeline.settings.topic_prefix + topic, None, None)
    assert producer.flush(20) == 0
    report = pipeline.rebuild(swap_in=False)
    assert report.equal
    assert report.undecodable == 2 * len(EVENT_TOPICS)
