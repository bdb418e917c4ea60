"""The stage runtime on a real broker: what each outcome leads to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from postroad.v1 import events_pb2 as pb
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topics import MX_OK, TASK_CREATED
from services.common.stage import membership, metrics
from services.common.stage.types import Dead, Done, Outcome, Record, Retry
from tests.forms import by_form
from tests.integration.stage_kit import PARTITIONS, Kit, created, passed_on, until
from tests.librdkafka import produce_with_header

DEFERRED = by_form(1500, 4000)


async def test_a_plain_handler_publishes_every_tasks_event_with_its_trace(kit: Kit) -> None:
    tasks = [created(n) for n in range(200)]
    async with kit.running(handle=passed_on):
        await kit.publish(tasks)
        await until(lambda: sum(kit.committed().values()) == 200)
    passed = kit.read(MX_OK)
    assert sorted(m.key() for m in passed) == sorted(t.key for t in tasks)
    headers = dict(passed[0].headers() or [])
    assert headers["traceparent"] == b"00-1-2-01"
    assert headers["ce_type"] == b"postroad.v1.mx.ok"
    assert headers["ce_source"] == b"/postroad/validator"


async def test_a_handler_that_waits_and_one_that_waits_only_sometimes(newest: Kit) -> None:
    async def slowly(record: Record) -> Outcome:
        await asyncio.sleep(0.05)
        return passed_on(record)

    def handle(record: Record) -> object:
        return slowly(record) if record.event.epoch % 2 else passed_on(record)

    async with newest.running(handle=handle):
        await newest.publish(created(n) for n in range(200))
        await until(lambda: sum(newest.committed().values()) == 200)
    assert len({m.key() for m in newest.read(MX_OK)}) == 200


async def test_a_batch_handler_gets_batches_and_is_called_again_when_it_raises(newest: Kit) -> None:
    sizes: list[int] = []
    broken = True

    async def handle_batch(records: Sequence[Record]) -> Sequence[Outcome]:
        if broken:
            raise ConnectionError("the database is away")
        sizes.append(len(records))
        return [passed_on(record) for record in records]

    await newest.publish(created(n) for n in range(300))
    async with newest.running(handle_batch=handle_batch) as runtime:
        await until(lambda: any("the database is away" in text for text in runtime.problems()))
        assert sum(newest.committed().values()) == 0
        broken = False
        await until(lambda: sum(newest.committed().values()) == 300)
        assert runtime.problems() == []
    assert sum(sizes) == 300
    assert max(sizes) > 50
    assert len(newest.read(MX_OK)) == 300
    assert newest.read("validator.dead") == []


async def test_a_retry_comes_back_as_the_next_attempt_never_early(kit: Kit) -> None:
    came: list[tuple[bytes | None, int, float]] = []
    due: dict[tuple[bytes | None, int], float] = {}

    def handle(record: Record) -> Outcome:
        came.append((record.key, record.attempt, time.time() * 1000))
        assert record.topic == TASK_CREATED
        assert record.traceparent == b"00-1-2-01"
        if record.attempt > 2:
            return passed_on(record)
        now_ms = int(time.time() * 1000)
        due[record.key, record.attempt + 1] = now_ms + 1000 * record.attempt + record.event.epoch
        return Retry(record.attempt, int(due[record.key, record.attempt + 1]), "not now")

    tasks = [created(n) for n in range(60)]
    async with kit.running(handle=handle):
        await kit.publish(tasks)
        await until(lambda: len(came) == 180)
        await until(lambda: sum(kit.committed("validator.delay.2").values()) == 60)
    for key, attempt, at in came:
        if attempt > 1:
            assert due[key, attempt] <= at < due[key, attempt] + 900
    assert sorted(m.key() for m in kit.read(MX_OK)) == sorted(t.key for t in tasks)
    headers = dict(kit.read("validator.delay.2")[0].headers() or [])
    assert headers["attempt"] == b"3"
    assert headers["origin"].startswith(b"task.created/")
    assert headers["cause"] == b"not now"
    assert headers["ce_type"] == b"postroad.v1.task.created"


def undecodable() -> dict[str, OutgoingRecord]:
    good = created()
    delay = [("due-at", b"1"), ("attempt", b"2"), ("origin", b"task.created/0/0"), ("cause", b"")]
    return {
        "the value is empty": OutgoingRecord(TASK_CREATED, b"k", b"", []),
        "not a TaskCreated": OutgoingRecord(TASK_CREATED, b"k", b"\xff" * 3000, good.headers),
        "task id is not 16 bytes": OutgoingRecord(
            TASK_CREATED, b"k", pb.TaskCreated(epoch=3).SerializeToString(), good.headers
        ),
        "origin is not": OutgoingRecord("validator.delay.1", good.key, good.value, good.headers),
        "is not read here": OutgoingRecord(
            "validator.delay.1", good.key, good.value, [*delay, ("origin", b"nothing.known/1/2")]
        ),
        "not a": OutgoingRecord("validator.delay.1", good.key, b"\x00garbage", delay),
    }


async def test_undecodable_records_become_dead_dead_letters_and_the_stage_goes_on(newest: Kit) -> None:
    bad = undecodable()
    async with newest.running(handle=passed_on):
        await newest.publish(bad.values())
        await newest.publish(created(n) for n in range(100))
        await until(lambda: sum(newest.committed().values()) == 103)
        await until(lambda: sum(newest.committed("validator.delay.1").values()) == 3)
    dead_letters = newest.read("validator.dead")
    causes = [dict(m.headers() or [])["cause"].decode() for m in dead_letters]
    assert len(dead_letters) == len(bad)
    for expected in bad:
        assert any(expected in cause for cause in causes), (expected, causes)
    assert sorted(m.value() or b"" for m in dead_letters) == sorted(o.value for o in bad.values())
    assert len(newest.read(MX_OK)) == 100


async def test_unreadable_headers_make_a_dead_letter_and_the_stage_goes_on(newest: Kit) -> None:
    good = created(1)
    producer = Producer({"bootstrap.servers": newest.infra.bootstrap})
    partitions = [*((TASK_CREATED, partition) for partition in range(PARTITIONS)), ("validator.delay.1", 0)]
    for topic, partition in partitions:
        produce_with_header(
            producer, newest.prefix + topic, partition, key=good.key, value=good.value, name=b"\xff"
        )
    assert producer.flush(20) == 0
    async with newest.running(handle=passed_on):
        await newest.publish(created(n) for n in range(100))
        await until(lambda: sum(newest.committed().values()) == 100 + PARTITIONS)
        await until(lambda: sum(newest.committed("validator.delay.1").values()) == 1)
    dead_letters = newest.read("validator.dead")
    assert len(dead_letters) == PARTITIONS + 1
    assert {m.value() for m in dead_letters} == {good.value}
    causes = {dict(m.headers() or [])["cause"] for m in dead_letters}
    assert causes == {b"headers that cannot be read: SystemError"}
    assert len(newest.read(MX_OK)) == 100


async def test_a_handlers_exception_makes_a_dead_letter_with_its_cause(newest: Kit) -> None:
    async def later(record: Record) -> Outcome:
        await asyncio.sleep(0)
        raise KeyError("late")

    def handle(record: Record) -> object:
        match record.event.epoch:
            case 1:
                raise ValueError("at once")
            case 2:
                return later(record)
            case 3:
                return Retry(77, 0, "no such delay")
            case 4:
                return "no outcome"
            case 5:
                return Dead("by choice")
        return passed_on(record)

    before = metrics.STAGE_RECORDS.labels("validator", "dead")._value.get()
    tasks = [created(n) for n in range(8)]
    async with newest.running(handle=handle):
        await newest.publish(tasks)
        await until(lambda: sum(newest.committed().values()) == 8)
    dead_letters = {m.key(): dict(m.headers() or []) for m in newest.read("validator.dead")}
    causes = {n: dead_letters[tasks[n].key]["cause"].decode() for n in range(1, 6)}
    assert causes[1] == "ValueError: at once"
    assert causes[2] == "KeyError: 'late'"
    assert causes[3].startswith("ValueError: a handler asked for a delay of 77 s")
    assert causes[4].startswith("TypeError")
    assert causes[5] == "by choice"
    assert all(headers["attempt"] == b"1" for headers in dead_letters.values())
    assert metrics.STAGE_RECORDS.labels("validator", "dead")._value.get() == before + 5
    assert len(newest.read(MX_OK)) == 3


async def test_an_event_too_large_for_the_broker_makes_a_dead_letter(newest: Kit) -> None:
    def handle(record: Record) -> Outcome:
        if record.event.epoch == 1:
            return Done([pb.MxFailed(id=record.key, detail="x" * (6 << 20))])
        return passed_on(record)

    async with newest.running(handle=handle):
        await newest.publish(created(n) for n in range(3))
        await until(lambda: sum(newest.committed().values()) == 3)
    (dead_letter,) = newest.read("validator.dead")
    assert b"cannot be published" in dict(dead_letter.headers() or [])["cause"]
    assert len(newest.read(MX_OK)) == 2


async def test_large_records_pass(newest: Kit) -> None:
    async with newest.running(handle=passed_on):
        await newest.publish(created(n, body="x" * (2 << 20)) for n in range(6))
        await until(lambda: sum(newest.committed().values()) == 6)
    assert len(newest.read(MX_OK)) == 6


async def test_more_replicas_than_partitions_are_all_ready(newest: Kit) -> None:
    kit = newest
    runtimes = [kit.runtime(handle=passed_on) for _ in range(PARTITIONS + 1)]
    runs = [asyncio.create_task(runtime.run()) for runtime in runtimes]
    try:
        await until(lambda: all(runtime.ready() for runtime in runtimes), 40)
        await kit.publish(created(n) for n in range(50))
        await until(lambda: sum(kit.committed().values()) == 50)
    finally:
        for runtime in runtimes:
            runtime.stop()
        await asyncio.gather(*runs)


async def test_thousands_deferred_at_once_all_come_back_in_time(newest: Kit) -> None:
    """The due times spread over two seconds, so each partition is held and read again many times."""
    kit, early, back, base = newest, 0, 0, 0

    def handle(record: Record) -> Outcome:
        nonlocal early, back
        due = base + 200 + record.event.epoch % 2000
        if record.attempt == 1:
            return Retry(2, due, "later")
        back += 1
        early += time.time() * 1000 < due
        return passed_on(record)

    async with kit.running(handle=handle):
        base = int(time.time() * 1000)
        await kit.publish(created(n) for n in range(DEFERRED))
        await until(lambda: back == DEFERRED, 60)
        await until(lambda: sum(kit.committed("validator.delay.2").values()) == DEFERRED)
    assert early == 0
    assert len({m.key() for m in kit.read(MX_OK)}) == DEFERRED


@pytest.mark.breaks_servers
async def test_a_broker_that_goes_and_comes_back_loses_nothing(newest: Kit) -> None:
    kit = newest
    async with kit.running(handle=passed_on) as runtime:
        await kit.publish(created(n) for n in range(200))
        kit.infra.kill("kafka-1")
        try:
            await until(lambda: any("brokers are down" in text for text in runtime.problems()))
        finally:
            await asyncio.to_thread(kit.infra.start, "kafka-1")
        await until(lambda: not runtime.problems(), 60)
        await kit.publish(created(n) for n in range(200))
        await until(lambda: sum(kit.committed().values()) == 400, 60)
    assert len({m.key() for m in kit.read(MX_OK)}) == 400


@pytest.mark.breaks_servers
async def test_stopping_while_the_broker_is_frozen_takes_no_longer_than_the_drain(newest: Kit) -> None:
    kit = newest
    runtime = kit.runtime(kit.with_(drain_seconds=2), handle=passed_on)
    run = asyncio.create_task(runtime.run())
    await until(runtime.ready)
    with kit.infra.frozen("kafka-1"):
        started = time.monotonic()
        runtime.stop()
        await run
        assert time.monotonic() - started < 10


async def test_a_consumer_that_never_reaches_its_coordinator_is_replaced(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_MAX_SILENCE", 1.5)
    monkeypatch.setattr(membership, "_ASK_BEFORE_JOIN", 0.5)
    monkeypatch.setattr(membership, "_ASK_WHEN_IDLE", 0.5)
    made: list[Consumer] = []

    def make(config: dict[str, Any]) -> Consumer:
        # The first consumer gets no response: nobody listens at its brokers' address.
        unreachable = config | {"bootstrap.servers": "127.0.0.1:9", "socket.timeout.ms": 1000}
        made.append(Consumer(config if made else unreachable))
        return made[-1]

    await kit.publish(created(n) for n in range(20))
    async with kit.running(handle=passed_on, consumer=make):
        await until(lambda: sum(kit.committed().values()) == 20, 30)
    assert len(made) == 2


async def test_a_stage_that_fails_closes_after_its_handlers_have_ended(newest: Kit) -> None:
    """`close` may need what a cancelled handler leaves behind."""
    begun, calls = asyncio.Event(), list[str]()

    class Breaking(Consumer):
        def poll(self, *arguments: Any, **named: Any) -> Any:
            if begun.is_set():
                raise RuntimeError("broken")
            return super().poll(*arguments, **named)

    async def handle(record: Record) -> Outcome:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            calls.append("handler")
        return passed_on(record)

    async def close() -> None:
        calls.append("close")

    settings = newest.with_(drain_seconds=0.1, revoke_seconds=0.1)
    runtime = newest.runtime(settings, handle=handle, close=close, consumer=Breaking)
    running = asyncio.create_task(runtime.run())
    await newest.publish([created()])
    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wait_for(running, 40)
    assert calls == ["handler", "close"]
