"""`postroad replay` on a real broker and a real database, without services: what it produces."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.deliveries.decide import Delivery
from services.common.deliveries.rows import store_rows
from services.common.events import DECODERS, Event, encode
from services.common.fold import delta
from services.common.kafka import admin as kafka_admin
from services.common.kafka.clients import producer_config
from services.common.kafka.headers import delayed_headers, parse_delayed_headers
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import MAIL_SENT, MX_OK, TASK_CREATED
from services.common.operations.replay.options import ReplayOptions
from services.common.operations.replay.records import OffsetRange, offset_ranges
from services.common.operations.replay.run import ReplayTakenOver, run
from services.common.operations.replay.store import (
    Replay,
    insert_replay,
    load_replay,
    save_replay,
    unfinished_replays,
)
from services.common.operations.replay.task_state import read_task_states
from services.common.stages import all_topics
from services.common.taskstore import upsert
from tests import forked
from tests.api_process import eventually
from tests.cli import Command
from tests.stack import Infra

pytestmark = pytest.mark.timeout(120)
NOW_US = time.time_ns() // 1000


def task(number: int, domain: str = "good.test", **labels: str) -> pb.MailTask:
    return pb.MailTask(
        id=uuid.uuid5(uuid.NAMESPACE_OID, str(number)).bytes,
        email=f"u{number}@{domain}",
        domain=domain,
        subject="s",
        body="b",
        labels=labels,
        created_at_us=NOW_US,
    )


def delivery(id_: bytes, state: Any, epoch: int = 0, attempt: int = 1, next_at: int = 0) -> Delivery:
    reason = "rejected" if state == "failed" else ""
    return Delivery(
        id_, state, epoch, attempt, 0, b"o" * 16, datetime(2026, 1, 1), 1, next_at, reason, "", "", "<m@x>"
    )


class Underway(forked.Process):
    """A command that runs."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="postroad-replay-")
        self._out, self._err = (Path(self._directory.name, name) for name in ("stdout", "stderr"))
        streams = (os.devnull, str(self._out), str(self._err))
        super().__init__("services.cli", command, environment, streams)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end. Return its exit code and what it wrote."""
        return self.wait(60), self._out.read_text(), self._err.read_text()


class Site:
    """One installation: topics under a prefix, a database, and the command."""

    def __init__(self, infra: Infra) -> None:
        self.prefix = infra.topic_prefix()
        self.url = infra.migrated_database()
        self.engine = make_engine(self.url)
        as_operator = infra.as_user("operator", self.url)
        self.settings = Settings(
            kafka_bootstrap=infra.bootstrap,
            topic_prefix=self.prefix,
            database_url=as_operator,
            partitions=2,
            sender_delays=(60,),
            validator_delays=(5,),
        )
        kafka_admin.apply(self.settings, all_topics(self.settings))
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("POSTROAD_")},
            "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
            "POSTROAD_TOPIC_PREFIX": self.prefix,
            "POSTROAD_DATABASE_URL": as_operator,
            # An operator's environment need not know the services' delays.
            "POSTROAD_SENDER_DELAYS": "99",
            "POSTROAD_VALIDATOR_DELAYS": "77",
        }

    def publish(self, *records: OutgoingRecord | Event) -> None:
        """Produce these records in this order within each partition, and wait for their acks."""
        producer = Producer(producer_config(self.settings, "test"))
        for record in records:
            out = record if isinstance(record, OutgoingRecord) else encode(record, "api")
            producer.produce(self.prefix + out.topic, out.value, out.key, headers=out.headers)  # type: ignore[arg-type]
        assert producer.flush(20) == 0

    def fold(self, *events: Event) -> None:
        """Write the rows that these events fold to."""
        with self.engine.begin() as connection:
            upsert(connection, map(delta, events))

    def settle(self, *rows: Delivery) -> None:
        """Write these rows into `deliveries`."""
        with self.engine.begin() as connection:
            store_rows(connection, rows)

    def start(self, *arguments: str) -> Underway:
        """Start `postroad replay ... -o json`."""
        return Underway(("replay", *arguments, "-o", "json"), self.environment)

    def replay(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run `postroad replay` to its end. Returns its result."""
        command = ("replay", *arguments, "-o", "json")
        ended, out, err = forked.run("services.cli", command, self.environment, seconds=60)
        assert ended == code, err
        return json.loads(out) if out else {"stderr": err}

    def records(self, topic: str) -> list[Any]:
        """Return all records of a topic, in each partition's order."""
        name = self.prefix + topic
        consumer = Consumer({"bootstrap.servers": self.settings.kafka_bootstrap, "group.id": "none"})
        found: list[Any] = []
        try:
            left = {n: s for n, s in offset_ranges(self.settings, topic, "start", "end").items() if s.left}
            consumer.assign([TopicPartition(name, number, 0) for number in left])
            deadline = time.monotonic() + 20
            while left:
                assert time.monotonic() < deadline, f"{topic} cannot be read"
                message: Any
                for message in consumer.consume(500, 0.1):
                    found.append(message)
                    if message.offset() + 1 >= left[message.partition()].end:
                        del left[message.partition()]
        finally:
            consumer.close()
        return found

    def replayed(self, topic: str, id_: str = "") -> list[Any]:
        """Return the records of a topic that a replay has produced: this one, or any."""
        found = ((r, dict(r.headers() or ()).get("replay-id")) for r in self.records(topic))
        return [r for r, by in found if (by == id_.encode() if id_ else by is not None)]

    def until_now(self) -> tuple[str, str]:
        """Return the options by which a replay reads what there is now, and nothing later."""
        time.sleep(0.05)  # Kafka's timestamps are milliseconds
        return "--to", datetime.now(UTC).isoformat()


@pytest.fixture(scope="module")
def site(infra: Infra) -> Iterator[Callable[[], Site]]:
    """A function that makes a new installation."""
    made: list[Site] = []

    def make() -> Site:
        made.append(Site(infra))
        return made[-1]

    yield make
    for one in made:
        one.engine.dispose()


def ids(records: Sequence[Any]) -> list[bytes]:
    return [record.key() for record in records]


def counts(result: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    return {(row["status"], row["reason"], row["what"]): row["records"] for row in result["counts"]}


class Situations(NamedTuple):
    """An installation with a task in every situation that matters, each with its `mx.ok`.

    `who` are their ids by name. A replay of `mx.ok` with the options `original` reads none that a replay
    produced.
    """

    here: Site
    who: dict[str, bytes]
    original: tuple[str, str]


@pytest.fixture(scope="module")
def situations(site: Callable[[], Site]) -> Situations:
    """One installation for all tests: a replay changes neither a task nor an original record."""
    here = site()
    return Situations(here, one_of_each(here), here.until_now())


def one_of_each(site: Site) -> dict[str, bytes]:
    names = ["no row", "pending", "processing", "sent", "sent, row lags", "failed", "failed, row lags"]
    names += ["cancelled", "uncertain", "waits", "overdue", "retried"]
    tasks = {name: task(number) for number, name in enumerate(names)}
    site.publish(*(pb.MxOk(task=t, attempt=1, at_us=NOW_US) for t in tasks.values()))
    site.publish(OutgoingRecord(MX_OK, b"k" * 16, b"\xff\xff", []), OutgoingRecord(MX_OK, b"", b"", []))
    at: dict[str, Any] = {"attempt": 1, "at_us": NOW_US + 5}
    known = {name: t for name, t in tasks.items() if name != "no row"}
    site.fold(
        *(pb.TaskCreated(task=t, at_us=NOW_US) for t in known.values()),
        *(pb.MxOk(task=t, attempt=1, at_us=NOW_US) for name, t in known.items() if name != "pending"),
        pb.MailSent(id=tasks["sent"].id, **at),
        pb.MailFailed(id=tasks["failed"].id, reason="rejected", **at),
        pb.MailFailed(id=tasks["uncertain"].id, reason="in_doubt", uncertain=True, **at),
        pb.TaskCancelled(id=tasks["cancelled"].id, at_us=NOW_US),
        pb.TaskCreated(task=tasks["retried"], epoch=NOW_US // 1000, at_us=NOW_US),
    )
    site.settle(
        delivery(tasks["sent"].id, "sent"),
        delivery(tasks["sent, row lags"].id, "sent"),
        delivery(tasks["failed"].id, "failed"),
        delivery(tasks["failed, row lags"].id, "failed"),
        delivery(tasks["cancelled"].id, "cancelled"),
        delivery(tasks["uncertain"].id, "uncertain"),
        delivery(tasks["waits"].id, "deferred", 0, 2, NOW_US + 10**10),
        delivery(tasks["overdue"].id, "deferred", 0, 2, NOW_US - 10**10),
        delivery(tasks["retried"].id, "cancelled"),
    )
    return {name: t.id for name, t in tasks.items()}


FOUND = {
    ("", "", "undecodable"): 2,
    ("pending", "", "again"): 3,
    ("processing", "", "again"): 1,
    ("processing", "", "waits"): 1,
    ("processing", "", "next attempt"): 1,
    ("completed", "", "already sent"): 2,
    ("failed", "rejected", "settled"): 2,
    ("cancelled", "", "settled"): 1,
    ("uncertain", "in_doubt", "settled"): 1,
}


def test_a_dry_run_shows_the_action_for_each_record_and_changes_nothing(situations: Situations) -> None:
    here, _, original = situations
    before = {topic: ids(here.records(topic)) for topic in (MX_OK, "sender.delay.60")}
    with here.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all()
    result = here.replay(MX_OK, *original, "--dry-run")
    assert counts(result) == FOUND
    assert (result["records"], result["produced"], result["id"]) == (14, 5, None)
    asked = counts(here.replay(MX_OK, *original, "--dry-run", "--reopen", "failed", "--reopen", "deferred"))
    assert asked[("failed", "rejected", "reopened")] == 2
    assert asked[("processing", "", "next attempt")] == 2
    # Without a terminal and --yes it shows the same.
    printed = here.replay(MX_OK, *original, code=2)["stderr"]
    assert "already sent" in printed
    assert printed.splitlines()[-1].startswith("postroad: ")
    assert {topic: ids(here.records(topic)) for topic in before} == before
    assert unfinished_replays(here.engine) == []
    with here.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM tasks ORDER BY id").all() == rows


@pytest.mark.parametrize("arguments", [["--yes"], []])
def test_a_replay_with_nothing_to_produce_has_a_result(filtered: Filtered, arguments: list[str]) -> None:
    here, original = filtered
    result = here.replay(TASK_CREATED, *original, "--status", "completed", *arguments)
    assert (result["records"], result["produced"]) == (5, 0)
    assert result["state"] == ("finished" if arguments else "nothing to do")
    assert (result["id"] is None) == (not arguments)


@pytest.mark.parametrize(("answer", "code", "produced"), [("n", 1, 0), ("y", 0, 4)])
def test_at_a_terminal_it_shows_and_asks(
    situations: Situations, answer: str, code: int, produced: int
) -> None:
    here, _, original = situations
    before = len(here.replayed(MX_OK))
    postroad = Command(here.environment)
    done = postroad.on_terminal("replay", MX_OK, *original, typed=f"{answer}\n", TERM="dumb")
    printed = done.out + done.err
    assert "already sent" in printed
    assert "Produce 5 records of 5 tasks to mx.ok at 500/s?" in printed
    assert done.code == code
    assert len(here.replayed(MX_OK)) == before + produced


def test_only_working_tasks_are_republished_in_their_epochs(situations: Situations) -> None:
    here, who, original = situations
    result = here.replay(MX_OK, *original, "--yes")
    assert counts(result) == FOUND
    assert (result["state"], result["produced"]) == ("finished", 5)
    again = {r.key(): DECODERS[MX_OK](r.value()) for r in here.replayed(MX_OK, result["id"])}
    assert set(again) == {who[name] for name in ("no row", "pending", "processing", "retried")}
    assert {event.epoch for id_, event in again.items() if id_ != who["retried"]} == {0}
    assert again[who["retried"]].epoch == NOW_US // 1000
    [next_one] = here.replayed("sender.delay.60", result["id"])
    back = parse_delayed_headers(next_one.headers())
    assert (next_one.key(), back.attempt, back.origin.topic) == (who["overdue"], 3, MX_OK)


def test_only_the_named_status_is_reopened_in_one_epoch(situations: Situations) -> None:
    here, who, original = situations
    began = time.time_ns() // 1_000_000
    reopen = ("--reopen", "failed", "--reopen", "cancelled", "--status", "failed")
    result = here.replay(MX_OK, *original, "--yes", *reopen)
    assert counts(result)[("failed", "rejected", "reopened")] == 2
    events = {r.key(): DECODERS[MX_OK](r.value()) for r in here.replayed(MX_OK, result["id"])}
    assert set(events) == {who["failed"], who["failed, row lags"]}
    [epoch] = {event.epoch for event in events.values()}
    assert began <= epoch <= time.time_ns() // 1_000_000


def test_the_sender_s_later_attempt_is_republished_as_that_attempt(site: Callable[[], Site]) -> None:
    """A delayed record is lost, and its attempt was released or its sender died."""
    here = site()
    states = [("released", 1), ("released", 2), ("sending", 2), ("sending", 3)]
    tasks = [task(number) for number in range(len(states))]
    here.publish(*(pb.MxOk(task=t, attempt=1, at_us=NOW_US) for t in tasks))
    here.fold(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks))
    here.settle(
        *(delivery(t.id, state, 0, attempt) for t, (state, attempt) in zip(tasks, states, strict=True))
    )
    named = [argument for t in tasks for argument in ("--id", str(uuid.UUID(bytes=t.id)))]
    assert counts(here.replay(MX_OK, *named, "--yes")) == {("processing", "", "again"): 4}
    assert ids(here.replayed(MX_OK)) == [tasks[0].id]
    came = {r.key(): parse_delayed_headers(r.headers()) for r in here.replayed("sender.delay.60")}
    assert {id_: back.attempt for id_, back in came.items()} == {
        tasks[1].id: 2,
        tasks[2].id: 2,
        tasks[3].id: 3,
    }
    assert {(back.due_at_ms, back.origin.topic) for back in came.values()} == {(0, MX_OK)}


def test_a_task_that_the_validator_deferred_is_republished_at_once(site: Callable[[], Site]) -> None:
    """Its `task.created` is a first attempt, whatever its delayed record waits for. It has no `mx.ok`."""
    here = site()
    one = task(0)
    created = pb.TaskCreated(task=one, at_us=NOW_US)
    waits = pb.MailDeferred(id=one.id, attempt=2, stage="validator", reason="dns_unavailable", at_us=NOW_US)
    waits.next_attempt_at_us = NOW_US + 10**9
    here.publish(created)
    here.fold(created, waits)
    result = here.replay(TASK_CREATED, "--id", str(uuid.UUID(bytes=one.id)), "--yes")
    assert counts(result) == {("pending", "dns_unavailable", "again"): 1}
    [again] = here.replayed(TASK_CREATED)
    assert DECODERS[TASK_CREATED](again.value()) == created


def test_a_refused_record_is_named_and_counted_and_the_replay_continues(
    site: Callable[[], Site],
) -> None:
    here = site()
    tasks = [task(n) for n in range(5)]
    tasks[2].body = random.Random(1).randbytes(4000).hex()
    here.publish(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks))
    limit = ConfigEntry("max.message.bytes", "3000", incremental_operation=AlterConfigOpType.SET)
    topic = ConfigResource(ResourceType.TOPIC, here.prefix + TASK_CREATED, incremental_configs=[limit])
    admin = AdminClient({"bootstrap.servers": here.settings.kafka_bootstrap})
    for changed in admin.incremental_alter_configs([topic]).values():
        changed.result()
    [large] = [r for r in here.records(TASK_CREATED) if r.key() == tasks[2].id]
    place = f"task.created/{large.partition()}/{large.offset()}"

    code, out, err = here.start(TASK_CREATED, "--yes").end()
    assert code == 1
    result = json.loads(out)
    assert (result["state"], result["records"], result["produced"]) == ("finished", 5, 4)
    assert counts(result) == {("pending", "", "again"): 4, ("pending", "", "refused"): 1}
    _, printed, last = err.splitlines()
    assert printed.startswith(f"{place} was not produced: ")
    assert "too large" in printed
    assert last == "postroad: 1 record could not be produced"
    assert {*ids(here.replayed(TASK_CREATED))} == {t.id for t in tasks} - {tasks[2].id}


def test_records_that_are_only_folded_are_republished_unchanged(site: Callable[[], Site]) -> None:
    here = site()
    events: list[Event] = [pb.MailSent(id=task(n).id, attempt=n, at_us=NOW_US) for n in range(5)]
    here.publish(*events)
    here.fold(*events)
    assert counts(here.replay(MAIL_SENT, "--yes")) == {("completed", "", "again"): 5}
    records = here.records(MAIL_SENT)
    assert Counter(r.value() for r in records) == dict.fromkeys((e.SerializeToString() for e in events), 2)


def test_delayed_records_of_working_tasks_are_republished_unchanged(site: Callable[[], Site]) -> None:
    here = site()
    tasks = [task(n) for n in range(4)]
    now_ms = NOW_US // 1000
    due = [now_ms - 5000, now_ms - 5000, now_ms + 10**8, now_ms - 5000]
    outs = [encode(pb.MxOk(task=t, attempt=1, at_us=NOW_US), "validator") for t in tasks]
    here.publish(
        *(
            OutgoingRecord(
                "sender.delay.60",
                out.key,
                out.value,
                delayed_headers(
                    out.headers, origin=RecordLocation(MX_OK, 0, n), attempt=2, cause="c", due_at_ms=due[n]
                ),
            )
            for n, out in enumerate(outs)
        ),
        OutgoingRecord("sender.delay.60", b"k" * 16, outs[0].value, outs[0].headers),
    )
    here.fold(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks))
    here.settle(delivery(tasks[1].id, "sent"), delivery(tasks[0].id, "deferred", 0, 1, NOW_US))
    result = counts(here.replay("sender.delay.60", "--yes"))
    assert result == {
        ("processing", "", "again"): 1,
        ("completed", "", "already sent"): 1,
        ("pending", "", "waits"): 1,
        ("pending", "", "again"): 1,
        ("", "", "undecodable"): 1,
    }
    again = here.replayed("sender.delay.60")
    assert set(ids(again)) == {tasks[0].id, tasks[3].id}
    assert {parse_delayed_headers(r.headers()).attempt for r in again} == {2}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--status", "failed"], {3, 4}),
        (["--status", "failed", "--status", "pending"], {0, 1, 2, 3, 4}),
        (["--reason", "null_mx"], {3}),
        (["--recipient", "U1@GOOD.test"], {1}),
        (["--domain", "Other.test"], {2, 4}),
        (["--domain", "other.test", "--status", "failed"], {4}),
        (["--label", "team=blue"], {1, 4}),
        (["--label", "team=blue", "--label", "n=4"], {4}),
        (["--id", str(uuid.UUID(bytes=task(2).id)), "--id", str(uuid.UUID(bytes=task(3).id))], {2, 3}),
        (["--label", "team=red"], set()),
    ],
)
def test_filters(filtered: Filtered, arguments: list[str], wanted: set[int]) -> None:
    here, original = filtered
    result = here.replay(TASK_CREATED, *original, "--yes", "--reopen", "failed", *arguments)
    assert result["produced"] == len(wanted)
    assert set(ids(here.replayed(TASK_CREATED, result["id"]))) == {task(n).id for n in wanted}


class Filtered(NamedTuple):
    """Five tasks: three pending, one failed for its domain, one rejected. One of them has no row.

    A replay with the options `original` reads their records and none that a replay produced.
    """

    here: Site
    original: tuple[str, str]


@pytest.fixture(scope="module")
def filtered(site: Callable[[], Site]) -> Filtered:
    """One installation for all tests, with a stored replay that is not finished."""
    here = site()
    tasks = [
        task(0),
        task(1, team="blue"),
        task(2, "other.test"),
        task(3),
        task(4, "other.test", team="blue", n="4"),
    ]
    here.publish(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks))
    here.fold(
        *(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks[1:]),
        pb.MxFailed(id=tasks[3].id, attempt=1, reason="null_mx", at_us=NOW_US),
        pb.MailFailed(id=tasks[4].id, attempt=1, reason="rejected", at_us=NOW_US),
    )
    insert_replay(here.engine, Replay("open", TASK_CREATED, ReplayOptions(TASK_CREATED).as_json(), 1, {}))
    return Filtered(here, here.until_now())


def test_it_begins_and_ends_at_its_points(site: Callable[[], Site]) -> None:
    here = site()
    early, late = [task(n) for n in range(6)], [task(n) for n in range(6, 18)]
    here.publish(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in early))
    time.sleep(0.05)  # Kafka's timestamps are milliseconds: the two halves must not share one
    middle = datetime.now(UTC)
    time.sleep(0.05)
    here.publish(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in late))
    everything = offset_ranges(here.settings, TASK_CREATED, "start", "end")
    assert sum(span.left for span in everything.values()) == 18
    after = offset_ranges(here.settings, TASK_CREATED, middle, "end")
    before = offset_ranges(here.settings, TASK_CREATED, "start", middle)
    assert sum(span.left for span in after.values()) == 12
    assert {n: span.end for n, span in before.items()} == {n: span.next for n, span in after.items()}
    future = offset_ranges(here.settings, TASK_CREATED, middle + timedelta(days=1), "end")
    assert sum(span.left for span in future.values()) == 0
    from_two = offset_ranges(here.settings, TASK_CREATED, 2, 10**15)
    assert all(span.next == min(2, everything[n].end) for n, span in from_two.items())
    backwards = offset_ranges(here.settings, TASK_CREATED, "end", "start")
    assert sum(span.left for span in backwards.values()) == 0
    text = middle.isoformat()
    assert here.replay(TASK_CREATED, "--yes", "--from", text)["produced"] == 12
    assert set(ids(here.replayed(TASK_CREATED))) == {t.id for t in late}


def many(here: Site, count: int) -> list[bytes]:
    tasks = [task(n) for n in range(count)]
    here.publish(*(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks))
    here.fold(
        *(pb.TaskCreated(task=t, at_us=NOW_US) for t in tasks),
        *(pb.MailFailed(id=t.id, attempt=1, reason="rejected", at_us=NOW_US) for t in tasks),
    )
    return [t.id for t in tasks]


def underway(here: Site, *arguments: str) -> Underway:
    """Start a replay. Return once it has stored a position before its end."""
    process = here.start(*arguments)

    def stored() -> bool:
        assert process.poll() is None, process.end()
        replays = (load_replay(here.engine, id_) for id_ in unfinished_replays(here.engine))
        return any(replay is not None and replay.counts.total() for replay in replays)

    eventually(stored, 60)
    return process


def test_an_interrupted_replay_says_how_to_resume_and_repeats_nothing(site: Callable[[], Site]) -> None:
    here = site()
    everyone = many(here, 200)
    process = underway(here, TASK_CREATED, "--yes", "--rate", "50", "--reopen", "failed")
    process.send_signal(signal.SIGINT)
    code, out, err = process.end()
    assert code == 130
    result = json.loads(out)
    assert result["state"] == "stopped"
    assert 0 < result["produced"] < 200
    [id_] = re.findall(r"postroad replay --resume (\S+)", err)
    assert id_ == result["id"]
    first = here.replayed(TASK_CREATED)
    assert len(first) == result["produced"], "what is counted is on the topic, and nothing else"
    done = here.replay("--resume", id_, "--rate", "5000")
    assert (done["state"], done["produced"]) == ("finished", 200)
    records = here.replayed(TASK_CREATED)
    assert Counter(ids(records)) == dict.fromkeys(everyone, 1)
    assert len({DECODERS[TASK_CREATED](r.value()).epoch for r in records}) == 1
    assert here.replay("--resume", id_)["produced"] == 200, "one that is at its end says so"
    assert len(here.replayed(TASK_CREATED)) == 200


def test_a_killed_replay_resumes_from_its_stored_position(site: Callable[[], Site]) -> None:
    here = site()
    everyone = many(here, 200)
    process = underway(here, TASK_CREATED, "--yes", "--rate", "50", "--reopen", "failed")
    process.kill()
    process.wait(10)
    [id_] = unfinished_replays(here.engine)
    killed = load_replay(here.engine, id_)
    assert killed is not None
    since = len(here.replayed(TASK_CREATED)) - killed.counts.total()
    assert killed.counts.total() >= 20
    assert here.replay("--resume", id_, "--rate", "5000")["state"] == "finished"
    records = here.replayed(TASK_CREATED)
    assert set(ids(records)) == set(everyone)
    # Only what it produced since the position was stored; some was on its way to Kafka.
    assert len(records) - 200 <= since + 10
    assert len({r.value() for r in records}) == 200, "a repeated record is the same record"
    assert unfinished_replays(here.engine) == []


def test_it_keeps_to_its_rate(site: Callable[[], Site]) -> None:
    here = site()
    many(here, 200)
    before = {n: span.end for n, span in offset_ranges(here.settings, TASK_CREATED, "start", "end").items()}
    assert here.replay(TASK_CREATED, "--yes", "--rate", "100", "--reopen", "failed")["produced"] == 200
    times = sorted(
        r.timestamp()[1] for r in here.records(TASK_CREATED) if r.offset() >= before[r.partition()]
    )
    # 200 at 100/s with five at once; a busy machine may be slower.
    assert 1.85 <= (times[-1] - times[0]) / 1000 <= 20
    for at in times:
        assert sum(at <= other < at + 1000 for other in times) <= 112, "in one second"


def test_a_replay_reads_no_record_that_arrives_meanwhile(
    site: Callable[[], Site],
) -> None:
    here = site()
    many(here, 50)
    process = here.start(TASK_CREATED, "--yes", "--rate", "50", "--reopen", "failed")
    eventually(lambda: unfinished_replays(here.engine))
    here.publish(*(pb.TaskCreated(task=task(n), at_us=NOW_US) for n in range(100, 150)))
    code, out, err = process.end()
    assert code == 0, err
    assert json.loads(out)["records"] == 50


def test_two_processes_cannot_resume_one_replay(filtered: Filtered) -> None:
    here = filtered.here
    todo = offset_ranges(here.settings, TASK_CREATED, "start", "end")
    insert_replay(here.engine, Replay("r", TASK_CREATED, {"topic": TASK_CREATED, "rate": 100.0}, 1, todo))
    mine, theirs = load_replay(here.engine, "r"), load_replay(here.engine, "r")
    assert mine is not None
    assert theirs is not None
    assert save_replay(here.engine, theirs)
    with pytest.raises(ReplayTakenOver):
        run(here.settings, here.engine, mine, threading.Event(), lambda left: None)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["mail.lost"], 2, "TOPIC: 'mail.lost'"),
        (["mx.ok", "--from", "yesterday"], 2, "--from: 'yesterday'"),
        (["mx.ok", "--reopen", "completed"], 2, "--reopen: 'completed'"),
        (["mail.sent", "--reopen", "failed"], 2, "--reopen: "),
        (["mx.ok", "--rate", "0"], 2, "--rate"),
        (["--resume", "nothing"], 3, "there is no replay nothing"),
        (["--resume", "open", "--rate", "inf"], 2, "--rate"),
        (["--resume", "open", "--rate", "nan"], 2, "--rate"),
        (["mx.ok", "--resume", "x"], 2, "--resume"),
        ([], 2, "TOPIC"),
    ],
)
def test_an_impossible_request_gets_one_line_and_its_exit_code(
    filtered: Filtered, arguments: list[str], code: int, line: str
) -> None:
    printed = filtered.here.replay(*arguments, code=code)["stderr"].splitlines()
    assert len(printed) == 1
    assert line in printed[0]


def test_unreachable_servers_have_their_own_exit_code(
    filtered: Filtered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(filtered.here.environment, "POSTROAD_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    printed = filtered.here.replay(MX_OK, "--dry-run", code=5)["stderr"]
    assert printed.startswith("postroad: Kafka at 127.0.0.1:1 does not answer: ")


def test_a_missing_topic_is_named(filtered: Filtered) -> None:
    here = filtered.here
    printed = here.replay("sender.delay.61", "--dry-run", code=3)["stderr"]
    assert printed == f"postroad: no topic {here.prefix}sender.delay.61: 'postroad topics apply' creates it\n"


# --- on both databases ---


def test_a_stored_replay_is_loaded_whole(engine: Engine) -> None:
    replay = Replay(
        "20260101T000000-aa", MX_OK, {"topic": MX_OK, "label": ["a=é"]}, 1 << 41, {0: OffsetRange(1, 5)}
    )
    insert_replay(engine, replay)
    kept = load_replay(engine, replay.id)
    assert kept == replay
    replay.ranges[0], replay.ranges[11] = OffsetRange(5, 5), OffsetRange(7, 9)
    replay.counts["failed", "rejected", "settled"] += 3
    assert save_replay(engine, replay)
    assert load_replay(engine, replay.id) == replay
    assert unfinished_replays(engine) == [replay.id]
    replay.finished = True
    assert save_replay(engine, replay)
    assert load_replay(engine, replay.id) == replay
    assert unfinished_replays(engine) == []
    assert load_replay(engine, "another") is None


def test_task_states_of_many_tasks(engine: Engine) -> None:
    tasks = [task(n, team="blue") for n in range(1100)]
    with engine.begin() as connection:
        upsert(connection, (delta(pb.TaskCreated(task=t, at_us=NOW_US)) for t in tasks))
        store_rows(connection, [delivery(tasks[0].id, "sent"), delivery(tasks[1].id, "deferred", 0, 3, 77)])
    found = read_task_states(engine, [*(t.id for t in tasks), b"unknown" * 2 + b"??"])
    assert len(found) == 1100
    assert found[tasks[0].id].status == "completed"
    assert (found[tasks[1].id].status, found[tasks[1].id].deferred) == ("processing", (3, 77))
    assert (found[tasks[2].id].status, found[tasks[2].id].labels) == ("pending", {"team": "blue"})
    assert read_task_states(engine, []) == {}
