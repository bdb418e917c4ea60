"""`postroad lag` on a real cluster, where no stage runs."""

from __future__ import annotations

import time
import uuid

from confluent_kafka import Producer

from postroad.v1 import events_pb2 as pb
from services.api import outbox
from services.common.database.engine import make_engine
from services.common.events import encode
from services.common.kafka.headers import delayed_headers
from services.common.kafka.topic_partition import RecordLocation
from tests.cli import Command
from tests.stack import Infra


def installation(infra: Infra, **settings: str) -> tuple[Command, str]:
    """An installation of the test's own: its command, and the prefix of its topics."""
    prefix = infra.topic_prefix()
    postroad = Command(
        {
            "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
            "POSTROAD_TOPIC_PREFIX": prefix,
            "POSTROAD_PARTITIONS": "2",
            "POSTROAD_VALIDATOR_DELAYS": "7",
            "POSTROAD_SENDER_DELAYS": "9",
            **settings,
        }
    )
    return postroad, prefix


def put(infra: Infra, topic: str, *headers: tuple[str, bytes]) -> None:
    producer = Producer({"bootstrap.servers": infra.bootstrap, "acks": "all"})
    producer.produce(topic, value=b"x" * 100_000, headers=list(headers), partition=0)
    assert producer.flush(20) == 0


def test_without_topics_it_says_what_to_do(infra: Infra) -> None:
    postroad, prefix = installation(infra)
    done = postroad("lag")
    assert (done.code, done.out) == (3, "")
    assert done.err == f"postroad: no topic {prefix}task.created: 'postroad topics apply' creates it\n"


def test_without_commits_lag_counts_from_the_start(infra: Infra) -> None:
    """Two stages read one topic, and each has its own oldest record there."""
    postroad, prefix = installation(infra)
    assert postroad("topics", "apply", "--yes").code == 0
    put(infra, f"{prefix}task.created")
    time.sleep(0.3)  # the record has an age
    put(infra, f"{prefix}task.created")
    found = postroad("lag", "--partitions", "--interval", "0", "-o", "json").json
    stages = {row["stage"]: row for row in found["stages"]}
    assert {name: row["lag"] for name, row in stages.items()} == {"validator": 2, "sender": 0, "status": 2}
    assert {name: row["state"] for name, row in stages.items()} == dict.fromkeys(stages, "none")
    for name in ("validator", "status"):
        assert 0.3 <= stages[name]["oldest_waiting_seconds"] < 60
        assert stages[name]["unowned"] == stages[name]["partitions"]
    assert stages["sender"]["oldest_waiting_seconds"] is None


def test_the_domains_of_uncommitted_mails_are_shown(infra: Infra) -> None:
    url = infra.migrated_database()
    postroad, prefix = installation(infra, POSTROAD_DATABASE_URL=url)
    assert postroad("topics", "apply", "--yes").code == 0
    producer = Producer({"bootstrap.servers": infra.bootstrap, "acks": "all"})
    tasks = {uuid.uuid4().bytes: "hangs.test" if n % 4 else "quick.test" for n in range(40)}
    for id_, domain in tasks.items():
        event = encode(pb.MxOk(task=pb.MailTask(id=id_, domain=domain), attempt=1, at_us=7), "validator")
        producer.produce(f"{prefix}mx.ok", event.value, event.key, headers=event.headers)  # type: ignore[arg-type]
    # A record of another producer, and two of a delay topic, one of which is due.
    producer.produce(f"{prefix}mx.ok", b"\xff", b"foreign", partition=0)
    for due_at_ms in (1000, 32_503_680_000_000):
        event = encode(
            pb.MxOk(task=pb.MailTask(id=bytes(16), domain="deferred.test"), attempt=1, at_us=7), "validator"
        )
        origin = RecordLocation("mx.ok", 0, 0)
        carried = delayed_headers(event.headers, origin=origin, attempt=2, cause="x", due_at_ms=due_at_ms)
        producer.produce(f"{prefix}sender.delay.9", event.value, event.key, headers=carried, partition=1)  # type: ignore[arg-type]
    assert producer.flush(20) == 0
    engine = make_engine(url)
    with engine.begin() as connection:
        for id_, domain in tasks.items():
            connection.exec_driver_sql(
                "INSERT INTO deliveries VALUES"
                " (%s, %s, 0, 1, 0, %s, UTC_TIMESTAMP(6), 0, 0, '', '', '', '', 0)",
                (id_, "sending" if domain == "hangs.test" else "sent", id_),
            )
    engine.dispose()
    asked = ("lag", "--stage", "sender", "--domains", "--interval", "0")
    found = postroad(*asked, "-o", "json").json
    shown = [(r["domain"], r["sending"], r["waiting"], r["finished"]) for r in found["domains"]]
    assert shown == [("hangs.test", 30, 0, 0), ("deferred.test", 0, 1, 0), ("quick.test", 0, 0, 10)]
    assert found["stages"][0]["lag"] == 41
    assert ["hangs.test", "30", "0", "0"] in [line.split()[:4] for line in postroad(*asked).lines]
    for options in ((), ("--stage", "status"), ("--stage", "status", "--stage", "sender")):
        assert postroad("lag", "--domains", *options).code == 2


def test_due_unpublished_events_are_counted(infra: Infra) -> None:
    url = infra.migrated_database()
    postroad, _ = installation(infra, POSTROAD_DATABASE_URL=url)
    assert postroad("topics", "apply", "--yes").code == 0
    asked = ("lag", "--interval", "0")
    assert postroad(*asked, "-o", "json").json["outbox"] == {"due": 0, "oldest_due_seconds": None}
    engine = make_engine(url)
    items = [outbox.created(bytes([n]) * 16) for n in range(40)]
    with engine.begin() as connection:
        outbox.put(connection, items)
        connection.exec_driver_sql("UPDATE outbox SET due_at = due_at - INTERVAL 300 SECOND")
        # A sweep could not publish them.
        outbox.defer(connection, items, outbox.SWEEP_SECONDS)
    engine.dispose()
    found = postroad(*asked, "-o", "json").json["outbox"]
    assert found["due"] == 40
    assert 300 <= found["oldest_due_seconds"] < 360
    assert ["outbox", "40"] in [line.split()[:2] for line in postroad(*asked).lines]
    # Without a database, only the database's part of the answer is missing.
    away = postroad(*asked, "-o", "json", POSTROAD_DATABASE_URL="mysql://postroad@127.0.0.1:1/postroad")
    assert (away.code, away.json["outbox"]) == (0, None)
    assert away.err.startswith("postroad: the outbox is not shown: the database: ")
    assert "outbox" not in postroad(*asked, "--stage", "sender", "-o", "json").json
