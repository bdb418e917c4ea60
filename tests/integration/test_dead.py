"""`postroad dead` on a real cluster, with dead letters that real stages wrote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections import Counter
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from postroad.v1 import events_pb2 as pb
from services.common.events import DECODERS, encode
from services.common.kafka import admin as kafka_admin
from services.common.kafka import headers
from services.common.kafka.headers import parse_delayed_headers
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import TASK_CREATED
from services.common.operations.dead_letters import redrive as redrive_module
from services.common.operations.dead_letters.dead_letter import DeadLetter
from services.common.operations.dead_letters.reader import UnresolvedDeadLetters, read_unresolved
from services.common.operations.dead_letters.redrive import purge, redrive
from services.common.operations.errors import NotFound
from services.common.operations.record_producer import RecordProducer
from services.common.stage.types import Dead, Done, Record, Retry
from services.common.stages import all_topics
from tests import forked
from tests.event_strategies import mail_task
from tests.forms import by_form
from tests.integration.stage_kit import Kit, created, passed_on, until
from tests.librdkafka import produce_with_header


def postroad(kit: Kit, *arguments: str) -> subprocess.CompletedProcess[str]:
    connection = ["--kafka", kit.infra.bootstrap, "--topic-prefix", kit.prefix]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}
    # An operator's environment need not know the services' delays.
    delays = {"POSTROAD_VALIDATOR_DELAYS": "77", "POSTROAD_SENDER_DELAYS": "99"}
    command = ["dead", *arguments, *connection]
    return subprocess.CompletedProcess(command, *forked.run("services.cli", command, environment | delays))


def answer(kit: Kit, *arguments: str) -> Any:
    done = postroad(kit, *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def dies(record: Record) -> Done:
    raise KeyError("template")


def unresolved(kit: Kit) -> UnresolvedDeadLetters:
    return read_unresolved(kit.settings, ["validator"])


def dead_letters(kit: Kit) -> list[DeadLetter]:
    return sorted(unresolved(kit).dead_letters.values(), key=lambda dead_letter: dead_letter.location)


def complete(kit: Kit) -> None:
    """Create the topics that the kit lacks and the command needs."""
    more = {kit.names.dead("sender"), kit.names.dead("status"), kit.names.delay("sender", 1)}
    kafka_admin.apply(kit.settings, [topic for topic in all_topics(kit.settings) if topic.name in more])


def written(kit: Kit) -> int:
    """Return how many records the stage's dead-letter topic has ever had."""
    return sum(kit.end("validator.dead").values())


async def killed(kit: Kit, count: int) -> list[DeadLetter]:
    """Run a stage with a faulty handler on `count` records. Returns its dead letters."""
    complete(kit)
    await kit.publish([created(number) for number in range(count)])
    async with kit.running(handle=dies):
        await until(lambda: written(kit) == count, 40)
    return dead_letters(kit)


async def test_dead_letters_are_redriven_after_the_fault_is_mended(newest: Kit) -> None:
    kit = newest
    await killed(kit, 5)
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    producer.produce(
        kit.names.topic(TASK_CREATED), b"\xff\x00garbage", b"key", headers=[("traceparent", b"00-1")]
    )
    assert producer.flush(10) == 0
    async with kit.running(handle=dies):
        await until(lambda: written(kit) == 6, 40)

    rows = answer(kit, "list")
    assert [(row["stage"], row["count"], row["origins"]) for row in rows] == [
        ("validator", 5, ["task.created"]),
        ("validator", 1, ["task.created"]),
    ]
    assert rows[0]["cause"] == "KeyError: 'template'"
    assert "not a TaskCreated" in rows[1]["cause"]
    garbage = answer(kit, "show", rows[1]["sample"])
    assert (garbage["event"], garbage["value"], garbage["key"]) == (None, "0xff00676172626167" + "65", "key")
    assert garbage["headers"]["traceparent"] == "00-1"
    shown = answer(kit, "show", rows[0]["sample"])
    assert shown["event"]["task"]["email"] == "a@good.test"
    assert (shown["cause"], shown["attempt"]) == ("KeyError: 'template'", 1)
    assert len(answer(kit, "list", "--each", "--stage", "validator")) == 6

    before = kit.end()
    replayed = {
        str(dead_letter.origin): dead_letter
        for dead_letter in dead_letters(kit)
        if "template" in dead_letter.cause
    }
    originals = {
        f"task.created/{m.partition()}/{m.offset()}": (m.key(), m.value(), m.headers())
        for m in kit.read(TASK_CREATED)
    }
    assert answer(kit, "replay", "--cause", "KeyError", "--yes") == {"replayed": 5, "kept": 0}
    again = [m for m in kit.read(TASK_CREATED) if (m.offset() or 0) >= before[m.partition() or 0]]
    # Key, value and headers are those of the first records.
    assert sorted((m.key(), m.value(), m.headers()) for m in again) == sorted(
        originals[origin] for origin in replayed
    )
    seen: list[bytes | None] = []

    def mended(record: Record) -> Done:
        seen.append(record.key)
        return passed_on(record)

    async with kit.running(handle=mended):
        await until(lambda: kit.committed() == kit.end())
    assert set(seen) == {dead_letter.key for dead_letter in replayed.values()}
    assert len(seen) == 5
    assert [row["count"] for row in answer(kit, "list")] == [1]

    # After the purge all are resolved, so that the partitions are emptied, with their resolutions.
    assert answer(kit, "purge", rows[1]["sample"], "--yes") == {"purged": 1}
    assert answer(kit, "list") == []
    emptied = read_unresolved(kit.settings)
    assert emptied.starts == emptied.ends
    gone = postroad(kit, "show", rows[1]["sample"])
    assert (gone.returncode, gone.stdout) == (3, "")
    assert len(gone.stderr.splitlines()) == 1


async def test_a_record_too_large_for_a_dead_letter_is_redriven_from_its_topic(
    newest: Kit,
) -> None:
    """The broker counts compressed bytes, a producer counts them before compression."""
    kit = newest
    complete(kit)
    event = encode(
        pb.TaskCreated(task=pb.MailTask(id=bytes(16), email="a@good.test", body="b" * (6 << 20)), at_us=1),
        "api",
    )
    many = {"compression.type": "lz4", "message.max.bytes": 60 << 20}
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap, **many})
    producer.produce(kit.names.topic(TASK_CREATED), event.value, event.key, headers=event.headers)  # type: ignore[arg-type]
    producer.produce(kit.names.topic(TASK_CREATED), b"b" * (6 << 20), b"foreign")
    assert producer.flush(10) == 0
    async with kit.running(handle=lambda _: Dead("refused")):
        await until(lambda: kit.committed() == kit.end())
    ours = next(dead_letter for dead_letter in dead_letters(kit) if dead_letter.key == event.key)
    row = answer(kit, "show", str(ours.location))
    assert (row["size"], row["value"], row["event"]) == (len(event.value), None, None)
    assert row["left_out"][0]["sha256"] == hashlib.sha256(event.value).hexdigest()
    assert row["attempt"] == 1
    assert "left out: the value, 62" in postroad(kit, "show", str(ours.location)).stdout

    assert answer(kit, "replay", "--cause", "refused", "--yes") == {"replayed": 1, "kept": 0}
    copies = [(m.key(), m.value(), m.headers()) for m in kit.read(TASK_CREATED) if m.key() == event.key]
    assert copies == [(event.key, event.value, event.headers)] * 2

    (foreign,) = dead_letters(kit)
    assert foreign.origin is not None
    gone = TopicPartition(kit.names.topic(TASK_CREATED), foreign.origin.partition, foreign.origin.offset + 1)
    for done in kit.admin.delete_records([gone]).values():
        done.result()
    refused = postroad(kit, "replay", "--all", "--yes")
    assert refused.returncode == 1
    assert f"{foreign.origin} is no longer on its topic" in refused.stderr
    assert dead_letters(kit) == [foreign]


async def test_a_dead_letter_that_kafka_refuses_stays_and_all_others_are_redriven(newest: Kit) -> None:
    kit = newest
    complete(kit)
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    event = encode(pb.MxOk(task=mail_task(0), attempt=1, at_us=7), "validator")
    # Records of one key share a batch, which the broker refuses for the sake of one record.
    for offset, value in enumerate([event.value, os.urandom(4000), event.value, event.value]):
        carried = headers.dead_letter_headers(
            event.headers, origin=RecordLocation("mx.ok", 2, offset), attempt=1, cause="OSError"
        )
        producer.produce(kit.names.dead("sender"), value, event.key, headers=carried)  # type: ignore[arg-type]
    assert producer.flush(10) == 0
    limit = ConfigEntry("max.message.bytes", "2000", incremental_operation=AlterConfigOpType.SET)
    topic = ConfigResource(ResourceType.TOPIC, kit.names.topic("mx.ok"), incremental_configs=[limit])
    for changed in kit.admin.incremental_alter_configs([topic]).values():
        changed.result()

    done = postroad(kit, "replay", "--all", "--yes", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"replayed": 3, "kept": 1})
    [stays] = read_unresolved(kit.settings, ["sender"]).dead_letters.values()
    assert stays.origin == RecordLocation("mx.ok", 2, 1)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{stays.location}: ")
    assert "too large" in line
    assert [message.value() for message in kit.read("mx.ok")] == [event.value] * 3


@pytest.mark.parametrize("attempt", by_form((2,), (2, 3)))
async def test_a_redriven_retry_comes_back_as_that_attempt(newest: Kit, attempt: int) -> None:
    kit = newest
    complete(kit)
    await kit.publish([created()])

    def dies_later(record: Record) -> Done | Retry:
        return dies(record) if record.attempt == attempt else Retry(1, 0, "not yet")

    async with kit.running(handle=dies_later):
        await until(lambda: written(kit), 40)
    (dead_letter,) = dead_letters(kit)
    assert dead_letter.attempt == attempt
    before = kit.end()
    assert answer(kit, "replay", "--all", "--yes") == {"replayed": 1, "kept": 0}
    assert kit.end() == before, "only its own stage sees it again"
    seen: list[tuple[str, int]] = []

    def mended(record: Record) -> Done:
        seen.append((record.topic, record.attempt))
        return passed_on(record)

    async with kit.running(handle=mended):
        await until(lambda: seen)
        await until(lambda: kit.committed("validator.delay.1") == kit.end("validator.delay.1"))
    assert seen == [(TASK_CREATED, attempt)]
    (passed,) = kit.read("mx.ok")
    assert pb.MxOk.FromString(passed.value() or b"").attempt == attempt
    assert dead_letters(kit) == []


async def test_a_retry_of_the_sender_is_redriven_to_its_delay_topic(newest: Kit) -> None:
    kit = newest
    complete(kit)
    event = encode(pb.MxOk(task=mail_task(0), attempt=1, at_us=7), "validator")
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    for attempt in (1, 2, 3):
        carried = headers.dead_letter_headers(
            event.headers, origin=RecordLocation("mx.ok", 2, 40), attempt=attempt, cause="OSError"
        )
        producer.produce(kit.names.dead("sender"), event.value, event.key, headers=carried)  # type: ignore[arg-type]
    assert producer.flush(10) == 0
    assert answer(kit, "replay", "--stage", "sender", "--yes") == {"replayed": 3, "kept": 0}
    (first,) = kit.read("mx.ok")
    assert (first.value(), first.headers()) == (event.value, event.headers)
    delayed = kit.read("sender.delay.1")
    came = [parse_delayed_headers(message.headers()) for message in delayed]  # type: ignore[arg-type]
    assert [(back.attempt, back.due_at_ms, back.origin.topic) for back in came] == [
        (2, 0, "mx.ok"),
        (3, 0, "mx.ok"),
    ]
    assert {(message.key(), message.value()) for message in delayed} == {(event.key, event.value)}


async def test_a_record_that_failed_in_two_stages_is_redriven_once(newest: Kit) -> None:
    """Each of two stages has a dead letter of it, and both read its topic."""
    kit = newest
    complete(kit)
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    events = [encode(pb.MxOk(task=mail_task(n), attempt=1, at_us=7), "validator") for n in range(3)]
    for number, event in enumerate(events):
        carried = headers.dead_letter_headers(
            event.headers, origin=RecordLocation("mx.ok", 2, number), attempt=1, cause="KeyError"
        )
        for stage in ("sender", "status")[: 1 + (number > 0)]:
            producer.produce(kit.names.dead(stage), event.value, event.key, headers=carried)  # type: ignore[arg-type]
    # The same location on a recreated topic holds another record.
    carried = headers.dead_letter_headers(
        events[0].headers, origin=RecordLocation("mx.ok", 2, 1), attempt=1, cause="KeyError"
    )
    producer.produce(kit.names.dead("status"), events[0].value, events[0].key, headers=carried)  # type: ignore[arg-type]
    assert producer.flush(10) == 0
    assert answer(kit, "replay", "--all", "--yes") == {"replayed": 6, "kept": 0}
    came = Counter(message.key() for message in kit.read("mx.ok"))
    assert came == {events[0].key: 2, events[1].key: 1, events[2].key: 1}
    assert answer(kit, "list") == []


async def test_resolved_dead_letters_before_the_first_open_one_are_deleted(
    newest: Kit,
) -> None:
    kit = newest
    all_ = await killed(kit, 13)
    # The partition with the most dead letters.
    by_partition = {p: [x for x in all_ if x.location.partition == p] for p in range(4)}
    partition, mine = max(by_partition.items(), key=lambda item: len(item[1]))
    assert len(mine) >= 4
    first, second, open_, *later = mine
    purge(kit.settings, later, lambda steps: None)
    assert unresolved(kit).starts["validator", partition] == 0
    assert {x.location for x in dead_letters(kit)} == {x.location for x in all_} - {x.location for x in later}
    purge(kit.settings, [second], lambda steps: None)
    assert unresolved(kit).starts["validator", partition] == 0
    assert redrive(kit.settings, [first], lambda steps: None) == 1
    left = unresolved(kit)
    assert left.starts["validator", partition] == open_.location.offset
    assert {place for place in left.dead_letters if place.partition == partition} == {open_.location}
    # A dead letter that somebody else has resolved meanwhile is gone.
    assert redrive(kit.settings, [first], lambda steps: None) == 0
    purge(kit.settings, [open_], lambda steps: None)
    done = unresolved(kit)
    assert done.starts["validator", partition] == done.ends["validator", partition] > 0


async def test_a_dead_letter_without_its_resolution_is_redriven_again(
    newest: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command dies between the two writes. The event is on its topic once more."""
    kit = newest
    (dead_letter,) = await killed(kit, 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(redrive_module, "_resolve", die)
        with pytest.raises(KeyboardInterrupt):
            redrive(kit.settings, [dead_letter], lambda steps: None)
    assert [x.location for x in dead_letters(kit)] == [dead_letter.location]
    assert redrive(kit.settings, [dead_letter], lambda steps: None) == 1
    copies = [(m.value(), m.headers()) for m in kit.read(TASK_CREATED)]
    assert copies == [copies[0]] * 3
    assert dead_letters(kit) == []


async def test_a_dead_letter_without_an_origin_cannot_be_redriven(newest: Kit) -> None:
    kit = newest
    complete(kit)
    event = encode(pb.MxOk(task=mail_task(0), attempt=1, at_us=7), "validator")
    carried = headers.dead_letter_headers(
        event.headers, origin=RecordLocation("mx.ok", 2, 40), attempt=1, cause="OSError: disk"
    )
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    producer.produce(kit.names.dead("sender"), event.value, event.key, headers=carried)  # type: ignore[arg-type]
    producer.produce(kit.names.dead("sender"), b"by hand", None)
    lost = headers.dead_letter_headers(
        None, origin=RecordLocation("sender.delay.1", 0, 0), attempt=1, cause="due-at is missing"
    )
    producer.produce(kit.names.dead("sender"), b"", b"k", headers=lost)  # type: ignore[arg-type]
    assert producer.flush(10) == 0

    asked = postroad(kit, "replay", "--all")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "--yes" in asked.stderr
    partly = postroad(kit, "replay", "--stage", "sender", "--yes", "-o", "json")
    assert (partly.returncode, json.loads(partly.stdout)) == (1, {"replayed": 1, "kept": 2})
    (message,) = kit.read("mx.ok")
    assert DECODERS["mx.ok"](message.value()) == DECODERS["mx.ok"](event.value)
    assert message.headers() == event.headers
    refused = postroad(kit, "replay", "--cause", "due-at", "--yes")
    assert refused.returncode == 1
    assert {row["cause"] for row in answer(kit, "list")} == {"", "due-at is missing"}
    assert answer(kit, "purge", "--all", "--yes") == {"purged": 2}
    assert answer(kit, "list") == []


async def test_a_wrong_request_gets_one_line(newest: Kit) -> None:
    kit = newest
    complete(kit)
    for code, *arguments in (
        (2, "replay"),
        (2, "purge", "--all", "--stage", "sender", "--yes"),
        (2, "list", "--stage", "nobody"),
        (2, "show", "sender"),
        (2, "show", "nobody/1/2"),
        (3, "show", "sender/0/99"),
        (3, "show", "sender/77/0"),
        (3, "purge", "--cause", "nothing has this", "--yes"),
    ):
        done = postroad(kit, *map(str, arguments))
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert len(done.stderr.splitlines()) == 1, done.stderr
    nothing = postroad(kit, "list")
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "There are no dead letters.\n")


def test_an_unreachable_cluster_has_its_own_exit_code() -> None:
    code, _, err = forked.run("services.cli", ["dead", "list", "--kafka", "127.0.0.1:1"], os.environ)
    assert (code, len(err.splitlines())) == (5, 1), err


def test_a_missing_topic_is_named(newest: Kit) -> None:
    kit = newest
    done = postroad(kit, "list", "--stage", "sender")
    line = f"postroad: no topic {kit.prefix}sender.dead: 'postroad topics apply' creates it\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", line)
    producer = RecordProducer(kit.settings)
    with pytest.raises(NotFound, match=r"no topic .*sender\.delay\.60: "):
        producer.put(kit.names.delay("sender", 60), b"k", b"v", [])


async def test_a_dead_letter_with_unreadable_headers_is_shown_and_purged(newest: Kit) -> None:
    kit = newest
    complete(kit)
    producer = Producer({"bootstrap.servers": kit.infra.bootstrap})
    produce_with_header(producer, kit.names.dead("validator"), 0, key=b"key", value=b"value", name=b"\xff")
    assert producer.flush(10) == 0
    [row] = answer(kit, "list", "--each", "--stage", "validator")
    assert answer(kit, "show", row["letter"])["key"] == "key"
    assert postroad(kit, "purge", "--stage", "validator", "--yes").returncode == 0
    assert dead_letters(kit) == []
