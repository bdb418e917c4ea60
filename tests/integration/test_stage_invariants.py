"""The invariants of the stage runtime that need a broker. tests/unit has those that do not."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from services.common.kafka.headers import LeftOut, left_out
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topics import MX_OK, TASK_CREATED
from services.common.stage import metrics
from services.common.stage.types import Dead, Outcome, Record, Retry
from tests import forked
from tests.forms import LONG, by_form
from tests.groups import describe, leave
from tests.integration.stage_kit import Kit, Watched, created, passed_on, until
from tests.stack import ROOT


class Child:
    """A stage in a process of its own (stage_child.py)."""

    def __init__(self, kit: Kit, directory: Path, seconds: float, **environment: str) -> None:
        self.journal_path = directory / "journal"
        self.log_path = directory / "log"
        self.journal_path.touch()
        clean = {k: v for k, v in os.environ.items() if not k.startswith("POSTROAD_")}
        given = {
            "POSTROAD_KAFKA_BOOTSTRAP": kit.infra.bootstrap,
            "POSTROAD_TOPIC_PREFIX": kit.prefix,
            "POSTROAD_GROUP_PROTOCOL": kit.protocol,
            "POSTROAD_PARTITIONS": "4",
            "CHILD_JOURNAL": str(self.journal_path),
            "CHILD_SECONDS": str(seconds),
        }
        streams = (os.devnull, os.devnull, str(self.log_path))
        self.process = forked.Process(
            "tests.integration.stage_child", [], clean | given | environment, streams, str(ROOT)
        )

    def begun(self) -> list[int]:
        """Return the epochs of the records that it has begun to handle so far."""
        return self._noted("begun")

    def handled(self) -> list[int]:
        """Return the epochs of the records that it has handled so far."""
        return self._noted("handled")

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def _noted(self, what: str) -> list[int]:
        lines = map(str.split, self.journal_path.read_text().splitlines())
        return [int(number) for event, number in lines if event == what]


@pytest.fixture
def child(kit: Kit, tmp_path: Path) -> Iterator[Any]:
    children: list[Child] = []

    def start(seconds: float, **environment: str) -> Child:
        directory = tmp_path / str(len(children))
        directory.mkdir()
        children.append(Child(kit, directory, seconds, **environment))
        return children[-1]

    yield start
    for one in children:
        one.process.kill()
        one.process.wait()


async def test_i1_committed_records_are_finished_and_offsets_never_go_back(kit: Kit) -> None:
    rng = random.Random(5)
    finished: set[tuple[int, int]] = set()

    async def handle(record: Record) -> Outcome:
        await asyncio.sleep(rng.random() * 1.5)
        finished.add((record.assignment.partition, record.offset))  # type: ignore[attr-defined]
        return passed_on(record)

    before: dict[int, int] = {}
    async with kit.running(handle=handle):
        await kit.publish(created(n) for n in range(400))
        while sum(before.values()) < 400:
            # The committed offsets were read first, so every record below them must be finished by now.
            after = kit.committed()
            for partition, offset in after.items():
                assert offset >= before.get(partition, 0)
                assert {(partition, o) for o in range(offset)} <= finished
            before = after
            await asyncio.sleep(0.1)


async def test_i2_every_record_ends_done_delayed_dead_or_uncommitted(kit: Kit) -> None:
    """After the drain time the runtime cancels handlers that hang; the next owner gets their records."""
    tasks = [created(n) for n in range(80)]

    async def handle(record: Record) -> Outcome:
        match record.event.epoch % 4:
            case 0:
                return passed_on(record)
            case 1 if record.attempt == 1:
                return Retry(1, int(time.time() * 1000) + 1000, "later")
            case 2:
                return Dead("no")
            case 3:
                await asyncio.Event().wait()
        return passed_on(record)

    async with kit.running(kit.with_(drain_seconds=1), handle=handle):
        await kit.publish(tasks)
        await until(lambda: kit.count("validator.dead") == 20)
        await until(lambda: kit.count(MX_OK) == 40)
    hung = {task.key for n, task in enumerate(tasks) if n % 4 == 3}
    committed = kit.committed()
    for message in kit.read(TASK_CREATED):
        if message.key() in hung:
            assert committed[message.partition()] <= message.offset()

    again: set[bytes | None] = set()

    def remember(record: Record) -> Outcome:
        again.add(record.key)
        return passed_on(record)

    async with kit.running(handle=remember):
        await until(lambda: kit.committed() == kit.end())
    assert hung <= again


async def test_i2_a_handler_that_cancels_itself_is_called_again(kit: Kit) -> None:
    tries = 0

    async def handle(record: Record) -> Outcome:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise asyncio.CancelledError
        return passed_on(record)

    async with kit.running(handle=handle):
        await kit.publish([created()])
        await until(lambda: tries == 1)
        assert sum(kit.committed().values()) == 0
        await until(lambda: sum(kit.committed().values()) == 1)
    assert tries == 2


async def test_i3_a_completion_from_before_a_revocation_moves_no_offset(newest: Kit) -> None:
    """Handlers outlive their assignment. The same offsets are fetched again, and only then do they end."""
    kit = newest
    late = asyncio.Event()
    started: list[Record] = []

    async def stubborn(record: Record) -> Outcome:
        started.append(record)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await late.wait()
        return passed_on(record)

    async def other(record: Record) -> Outcome:
        await asyncio.Event().wait()
        return passed_on(record)

    def moved() -> set[bytes]:
        return {record.key for record in started[:RECORDS] if not record.assignment.live}  # type: ignore[attr-defined]

    RECORDS = 40
    settings = kit.with_(revoke_seconds=0.5, drain_seconds=0.1)
    async with kit.running(settings, handle=stubborn) as first:
        # Each partition has some of them, and the other members take at least one of it.
        await kit.publish(created(n) for n in range(RECORDS))
        await until(lambda: len(started) == RECORDS)
        joining = [kit.runtime(settings, handle=other) for _ in range(3)]
        others = [(runtime, asyncio.create_task(runtime.run())) for runtime in joining]
        await until(moved, 60)
        for runtime, _ in others:
            runtime.stop()
        await asyncio.gather(*(run for _, run in others))
        await until(lambda: moved() <= {record.key for record in started[RECORDS:]}, 60)
        late.set()
        await until(lambda: kit.count(MX_OK) == len(moved()))
        # The late outcomes are published and their records released. Wait for another commit.
        count = len(started)
        await kit.publish([created(RECORDS)])
        await until(lambda: len(started) > count)
        await asyncio.sleep(1.5)
        assert first.problems() == []
        assert sum(kit.committed().values()) == 0


async def test_i4_the_records_of_a_stalled_handler_are_bounded(kit: Kit) -> None:
    go = asyncio.Event()
    holding: list[Record] = []

    async def handle(record: Record) -> Outcome:
        holding.append(record)
        await go.wait()
        return passed_on(record)

    settings = kit.with_(max_in_flight=1000, max_in_flight_bytes=8 << 20)
    await kit.publish(created(n, body="x" * 100_000) for n in range(300))
    async with kit.running(settings, handle=handle):
        await until(lambda: len(holding) >= 40)
        for _ in range(20):
            await asyncio.sleep(0.1)
            # 8 MiB hold 41 of these records. What the client has fetched by then comes on top: up to 12 MiB.
            assert len(holding) <= 200
        gauge = metrics.STAGE_IN_FLIGHT.labels("validator")
        assert gauge.collect()[0].samples[0].value == len(holding)
        go.set()
        await until(lambda: sum(kit.committed().values()) == 300, 60)
    assert Counter(r.key for r in holding).most_common(1)[0][1] == 1


async def test_i4_deferred_records_take_no_memory(newest: Kit) -> None:
    kit = newest
    due = int(time.time() * 1000) + 60_000
    template = created(body="x" * 4000)
    headers = [
        *template.headers,
        ("due-at", b"%d" % due), ("attempt", b"2"), ("origin", b"task.created/0/0"), ("cause", b"x"),
    ]  # fmt: skip
    # In memory even the smaller number would take more than the assertion allows.
    for start in range(0, by_form(12_000, 30_000), 6_000):
        await kit.publish(
            OutgoingRecord("validator.delay.2", b"%d" % n, template.value, headers)
            for n in range(start, start + 6_000)
        )
    handled: list[Record] = []

    def handle(record: Record) -> Outcome:
        handled.append(record)
        return passed_on(record)

    async with kit.running(handle=handle):
        await until(lambda: metrics.STAGE_HELD.labels("validator")._value.get() == 4)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await kit.publish(created(n) for n in range(200))
        await until(lambda: sum(kit.committed().values()) == 200)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
        assert len(handled) == 200
        assert all(record.attempt == 1 for record in handled)


async def test_i5_only_the_pollers_thread_touches_the_consumer(kit: Kit) -> None:
    made: list[Watched] = []

    def make(config: dict[str, Any]) -> Watched:
        made.append(Watched(config))
        return made[-1]

    async def handle(record: Record) -> Outcome:
        await asyncio.sleep(0.4)
        if record.attempt == 1:
            return Retry(2, int(time.time() * 1000) + 2000, "later")
        return passed_on(record)

    # The handler is so slow and the limit so low that the poller pauses and holds a delay topic.
    async with kit.running(kit.with_(max_in_flight=30), handle=handle, consumer=make):
        await kit.publish(created(n) for n in range(60))
        await until(lambda: kit.count(MX_OK) == 60, 60)
    assert [watched.threads for watched in made] == [{"poller"}]
    assert {"subscribe", "poll", "consume", "commit", "pause", "resume", "seek", "close"} <= made[0].calls


async def test_i6_a_busy_member_is_never_evicted(kit: Kit) -> None:
    """At the in-flight limit for longer than a member may go without a poll, it stays in its group."""
    handled: Counter[bytes | None] = Counter()
    go = asyncio.Event()

    async def handle(record: Record) -> Outcome:
        handled[record.key] += 1
        await go.wait()
        return passed_on(record)

    async with kit.running(kit.with_(max_in_flight=20), handle=handle, consumer=_short_lived(kit)):
        await kit.publish(created(n) for n in range(100))
        await until(lambda: len(handled) >= 20)
        rebalances = _rebalances()
        await asyncio.sleep(_longer_than_it_lives(kit))
        assert _rebalances() == rebalances
        go.set()
        await until(lambda: sum(kit.committed().values()) == 100)
    assert set(handled.values()) == {1}


async def test_i6_polling_goes_on_while_draining(kit: Kit) -> None:
    handled: Counter[bytes | None] = Counter()

    async def handle(record: Record) -> Outcome:
        handled[record.key] += 1
        await asyncio.sleep(_longer_than_it_lives(kit))
        return passed_on(record)

    async with kit.running(kit.with_(drain_seconds=30), handle=handle, consumer=_short_lived(kit)):
        await kit.publish(created(n) for n in range(20))
        await until(lambda: len(handled) == 20)
    assert sum(kit.committed().values()) == 20


async def test_i7_nothing_is_committed_after_partitions_were_lost(kit: Kit, child: Any) -> None:
    """A replica is frozen until another has taken over and its own handlers are due, and then continues."""
    stopped = child(4.0)
    await until(lambda: "partitions assigned" in stopped.log(), 30)
    await kit.publish(created(n) for n in range(40))
    await until(lambda: len(stopped.begun()) == 40)
    stopped.process.send_signal(signal.SIGSTOP)
    due = time.monotonic() + 4
    try:
        assert stopped.handled() == []
        _fence(kit)
        # The next owner finishes only two records each, so the frozen one could commit higher offsets.
        taken = 0

        async def handle(record: Record) -> Outcome:
            nonlocal taken
            taken += 1
            if record.offset >= 2:  # type: ignore[attr-defined]
                await asyncio.Event().wait()
            return passed_on(record)

        async with kit.running(kit.with_(drain_seconds=0.1), handle=handle):
            await until(lambda: taken == 40, 60)
            await until(lambda: set(kit.committed().values()) == {2})
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            stopped.process.send_signal(signal.SIGCONT)
            await until(lambda: "partitions lost" in stopped.log(), 60)
            # It would commit in this time. It handles none of the records again so soon.
            await asyncio.sleep(2)
            assert set(kit.committed().values()) <= {2}
    finally:
        stopped.process.send_signal(signal.SIGCONT)


async def test_i8_the_records_of_a_revoked_partition_are_finished_before_the_next_owner_has_it(
    kit: Kit,
) -> None:
    handled: Counter[bytes | None] = Counter()

    async def handle(record: Record) -> Outcome:
        handled[record.key] += 1
        await asyncio.sleep(0.3)
        return passed_on(record)

    tasks = [created(n) for n in range(200)]
    settings = kit.with_(max_in_flight=20)
    async with kit.running(settings, handle=handle):
        publishing = asyncio.create_task(kit.publish(tasks))
        async with kit.running(settings, handle=handle):
            async with kit.running(settings, handle=handle):
                await publishing
                await until(lambda: len(handled) > 100, 30)
            await until(lambda: sum(kit.committed().values()) == 200, 60)
    assert len(handled) == 200
    # Each record was handled once, although its partition may have moved twice.
    assert set(handled.values()) == {1}


@pytest.mark.skipif(not LONG, reason="waits for longer than a session of 10 s: make test-long")
async def test_i8_waiting_for_a_revoked_partition_may_take_longer_than_a_session(kit: Kit) -> None:
    handled: Counter[bytes | None] = Counter()

    async def handle(record: Record) -> Outcome:
        handled[record.key] += 1
        await asyncio.sleep(14)
        return passed_on(record)

    lost = metrics.STAGE_REBALANCES.labels("validator", "lost")._value
    before = lost.get()
    settings = kit.with_(revoke_seconds=20, drain_seconds=30)
    async with kit.running(settings, handle=handle):
        await kit.publish(created(n) for n in range(40))
        await until(lambda: len(handled) == 40)
        async with kit.running(settings, handle=handle):
            await until(lambda: sum(kit.committed().values()) == 40, 60)
    assert set(handled.values()) == {1}
    assert lost.get() == before


async def test_i8_the_deadline_ends_the_wait_and_the_next_owner_handles_the_records(kit: Kit) -> None:
    cancelled: list[Record] = []

    async def hang(record: Record) -> Outcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(record)
            raise
        return passed_on(record)

    tasks = [created(n) for n in range(40)]
    by_next: set[bytes | None] = set()

    def handle(record: Record) -> Outcome:
        by_next.add(record.key)
        return passed_on(record)

    async with kit.running(kit.with_(revoke_seconds=1, drain_seconds=0.1), handle=hang):
        await kit.publish(tasks)
        async with kit.running(handle=handle):
            await until(lambda: cancelled and len(by_next) == len(cancelled), 40)
            assert {record.key for record in cancelled} == by_next
    assert 0 < len(by_next) < 40 or kit.protocol == "classic"


async def test_i8_a_partition_that_left_while_paused_is_read_again_when_it_returns(kit: Kit) -> None:
    go = asyncio.Event()
    handled: set[bytes | None] = set()

    async def handle(record: Record) -> Outcome:
        await go.wait()
        handled.add(record.key)
        return passed_on(record)

    async def never(record: Record) -> Outcome:
        await asyncio.Event().wait()
        return passed_on(record)

    settings = kit.with_(max_in_flight=8, revoke_seconds=0.5, drain_seconds=0.1)
    async with kit.running(settings, handle=handle):
        await kit.publish(created(n) for n in range(200))
        paused = metrics.STAGE_PAUSED.labels("validator")._value
        await until(lambda: paused.get() == 1)
        async with kit.running(settings, handle=never):
            await until(lambda: metrics.STAGE_PARTITIONS.labels("validator")._value.get() < 12)
        go.set()
        await until(lambda: len(handled) == 200)
        await until(lambda: sum(kit.committed().values()) == 200)


async def test_i9_commits_wait_for_a_dead_letter_that_cannot_be_produced(kit: Kit) -> None:
    topic = ConfigResource(ResourceType.TOPIC, kit.names.dead("validator"))

    def limit(size: int) -> None:
        entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
        changed = ConfigResource(ResourceType.TOPIC, topic.name, incremental_configs=[entry])
        for done in kit.admin.incremental_alter_configs([changed]).values():
            done.result()

    failures = metrics.STAGE_PUBLISH_FAILURES.labels("validator")._value
    before = failures.get()
    # Even a dead letter without its value and its headers is too large.
    limit(60)
    bad = OutgoingRecord(TASK_CREATED, b"k", random.Random(1).randbytes(5000), [])
    async with kit.running(handle=passed_on) as runtime:
        await kit.publish([bad])
        await kit.publish(created(n) for n in range(100))
        await until(lambda: kit.count(MX_OK) == 100)
        await until(lambda: failures.get() > before + 3)
        assert any("wait for their events" in problem for problem in runtime.problems())
        (message,) = [m for m in kit.read(TASK_CREATED) if m.key() == b"k"]
        assert kit.committed()[message.partition()] <= message.offset()
        limit(1_000_000)
        await until(lambda: kit.committed() == kit.end(), 30)
        assert runtime.problems() == []
    (dead_letter,) = kit.read("validator.dead")
    assert left_out(dead_letter.headers()) == (LeftOut.of("value", bad.value), LeftOut.of("key", b"k"))
    assert (
        dict(dead_letter.headers() or [])["origin"]
        == f"task.created/{message.partition()}/{message.offset()}".encode()
    )


async def test_i10_sigterm_under_load_drains_commits_and_exits_0(kit: Kit, child: Any) -> None:
    first = child(0.5, POSTROAD_MAX_IN_FLIGHT="50")
    await until(lambda: "partitions assigned" in first.log(), 30)
    publishing = asyncio.create_task(kit.publish(created(n) for n in range(500)))
    await until(lambda: len(first.handled()) > 50, 30)
    first.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.process.wait, 20) == 0
    await publishing
    handled = first.handled()
    # Exactly the records that it handled are committed, so the next replica gets each of the others once.
    assert sum(kit.committed().values()) == len(handled) < 500
    second = child(0)
    await until(lambda: len(second.handled()) == 500 - len(handled), 60)
    await until(lambda: kit.committed() == kit.end())
    assert sorted(handled + second.handled()) == list(range(500))


async def test_a_killed_replicas_records_are_handled_by_the_next(kit: Kit, child: Any) -> None:
    first = child(1.5, POSTROAD_MAX_IN_FLIGHT="50")
    await until(lambda: "partitions assigned" in first.log(), 30)
    publishing = asyncio.create_task(kit.publish(created(n) for n in range(200)))
    await until(lambda: len(first.handled()) > 20, 30)
    # It commits twice a second, so also while the next records are in flight.
    await asyncio.sleep(1)
    first.process.kill()
    _fence(kit)
    await publishing
    second = child(0)
    await until(lambda: set(first.handled()) | set(second.handled()) == set(range(200)), 60)
    await until(lambda: len({m.key() for m in kit.read(MX_OK)}) == 200)


def _fence(kit: Kit) -> None:
    """Let the group's only member be fenced at once, not after its session of 10 s."""
    if kit.protocol == "consumer":
        [member] = describe(kit.infra.bootstrap, kit.group).members
        leave(kit.infra.bootstrap, kit.group, member.id)


def _rebalances() -> float:
    return sum(
        metrics.STAGE_REBALANCES.labels("validator", kind)._value.get()
        for kind in ("assigned", "revoked", "lost")
    )


def _short_lived(kit: Kit) -> Any:
    def make(config: dict[str, Any]) -> Watched:
        if kit.protocol == "classic":
            return Watched(config | {"max.poll.interval.ms": 10_000, "session.timeout.ms": 6000})
        return Watched(config | {"max.poll.interval.ms": 4000})

    return make


def _longer_than_it_lives(kit: Kit) -> float:
    """Return for how many seconds such a consumer must not go without a poll."""
    return 13 if kit.protocol == "classic" else 6.5
