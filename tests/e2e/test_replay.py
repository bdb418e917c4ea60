"""Replays and group resets of a working system send nothing again and change no task."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition

from postroad.v1 import events_pb2 as events
from services.common.events import encode
from services.common.kafka.topics import EVENT_TOPICS, MX_OK, TASK_CREATED
from services.common.stages import STAGES
from tests import forked
from tests.e2e.load import Load
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.test_cancel_races import cancel
from tests.forms import by_form
from tests.groups import Offsets, describe
from tests.stack import Stack

SENT = by_form(30, 5000)
REJECTED = by_form(6, 300)
UNANSWERED, WAITING, CANCELLED = 3, 3, 3


def replay(stack: Stack, *arguments: str) -> dict[str, Any]:
    """Run `postroad replay` to its end and return its result."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
    command = ("replay", *arguments, "--yes", "-o", "json")
    code, out, err = forked.run("services.cli", command, {**clean, **stack.env()})
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    print(*arguments, *(f"{c['status']}/{c['reason']} {c['what']} {c['records']};" for c in result["counts"]))
    return result


def became(result: dict[str, Any], what: str) -> int:
    return sum(row["records"] for row in result["counts"] if row["what"] == what)


def reset_to_earliest(stack: Stack, stage: str) -> None:
    """Do as `kafka-consumer-groups --reset-offsets --all-topics --to-earliest --execute` does to a group."""
    cluster, name = stack.kafka, stack.names.group(stage)
    until(lambda: not describe(cluster, name).members, f"{name} without members", 30)
    with Offsets(cluster, name) as group:
        mine = [at for at in group.partitions() if at.topic.startswith(stack.names.prefix)]
        committed = group.committed(mine)
        assert committed
        bounds = group.bounds(TopicPartition(*at) for at in committed)
        group.reset(TopicPartition(*at, low) for at, (low, _) in bounds.items())


def caught_up(stack: Stack) -> None:
    """Wait until each stage has committed all present records of its topics; more may come meanwhile."""
    names = stack.names
    for stage, spec in STAGES.items():
        started = time.monotonic()
        with Offsets(stack.kafka, names.group(stage)) as group:
            all_partitions = group.partitions(map(names.topic, spec.reads))
            partitions = [TopicPartition(*at) for at in group.committed(all_partitions)]
            ends = {at: high for at, (_, high) in group.bounds(partitions).items()}

            def there(group: Offsets = group, ends: dict[tuple[str, int], int] = ends) -> bool:
                committed = group.committed(TopicPartition(*at) for at in ends)
                return all(committed[at] >= end for at, end in ends.items())

            until(there, f"{stage} at the end that its topics had", 120)
        print(f"{stage} caught up in {time.monotonic() - started:.1f} s")


class Before:
    """A system with tasks that ended in every way, and a record of them."""

    def __init__(self, stack: Stack, pipeline: Pipeline) -> None:
        self.stack, self.pipeline = stack, pipeline
        stack.control_mail(rules=[{"rcpt": "*@broken.ok.test", "fault": "reject5"}])
        stack.control_dns(**{"mute.ok.test": "servfail"})
        self.waiting = pipeline.create_many([f"reject4+{n}@good.test" for n in range(WAITING)], "waiting")
        self.cancelled = pipeline.create_many(
            [f"reject4+c{n}@good.test" for n in range(CANCELLED)], "cancelled"
        )
        emails = [f"u{n}@d{n % 50}.ok.test" for n in range(SENT)]
        self.sent = pipeline.create_many(emails, "sent")
        self.rejected = pipeline.create_many([f"u{n}@broken.ok.test" for n in range(REJECTED)], "rejected")
        self.unanswered = pipeline.create_many([f"u{n}@mute.ok.test" for n in range(UNANSWERED)], "mute")
        for id_ in [*self.waiting, *self.cancelled]:
            # The next attempt comes in an hour.
            until(lambda i=id_: pipeline.get(i).attempts == 2, f"a second attempt of {id_}")  # type: ignore[misc]
        self._cancel()
        pipeline.settled([*self.sent, *self.failed, *self.cancelled], 120)
        until(lambda: not any(pipeline.lag().values()), "all committed", 60)
        self.ids = [*self.sent, *self.failed, *self.cancelled, *self.waiting]
        self.statuses = self.now()
        self.copies = pipeline.copies(self.ids)
        assert {self.copies[id_] for id_ in self.sent} == {1}
        assert {self.statuses[id_] for id_ in self.failed} == {"failed"}
        assert {self.statuses[id_] for id_ in self.waiting} == {"processing"}
        # The causes of their failures are gone: a task that goes again would be sent.
        stack.control_mail()
        stack.control_dns()

    @property
    def failed(self) -> list[str]:
        return [*self.rejected, *self.unanswered]

    def now(self) -> dict[str, str]:
        """Return these tasks as they are now."""
        wanted = set(self.ids)
        return {row.id: row.status for row in self.pipeline.list_all() if row.id in wanted}

    def stand(self, ids: list[str]) -> set[str]:
        """Return the statuses of these tasks."""
        now = self.now()
        return {now[id_] for id_ in ids}

    def same(self) -> None:
        """Fail unless all tasks are as they were and no mail was sent again."""
        copies = self.pipeline.copies(self.ids)
        again = {id_ for id_ in self.ids if copies[id_] != self.copies[id_]}
        assert not again, f"{len(again)} mails were sent again"
        now = self.now()
        assert now == self.statuses, {
            i: (self.statuses[i], s) for i, s in now.items() if s != self.statuses[i]
        }

    def _cancel(self) -> None:
        producer = Producer(self.stack.kafka)
        for id_ in self.cancelled:
            out = encode(events.TaskCancelled(id=bytes.fromhex(id_.replace("-", "")), at_us=1), "api")
            producer.produce(self.stack.names.topic(out.topic), out.value, out.key, headers=out.headers)  # type: ignore[arg-type]
        assert producer.flush(20) == 0


@pytest.fixture(scope="module")
def before(hold_stack: Stack) -> Iterator[Before]:
    with Pipeline(hold_stack) as pipeline:
        yield (before := Before(hold_stack, pipeline))
        for id_ in before.waiting:
            cancel(pipeline, id_)


def nothing_is_left(before: Before, load: Load) -> None:
    """Fail unless tasks created meanwhile sent one mail each, and all others are as they were."""
    started = time.monotonic()
    lag: dict[str, int] = {}

    def none_left() -> bool:
        lag.update(before.pipeline.lag())
        return not any(lag.values())

    try:
        until(none_left, "the lag is 0 again", 180)
    finally:
        print(f"{len(load.ids)} tasks came meanwhile; lag {lag} after {time.monotonic() - started:.1f} s")
    before.pipeline.settled(load.ids, 30)
    before.pipeline.sent_once(load.ids)
    before.same()


@pytest.mark.timeout(900)
def test_replays_send_nothing_again_while_tasks_arrive(before: Before) -> None:
    pipeline, stack = before.pipeline, before.stack
    over = pipeline.list_all(status=["failed", "uncertain", "cancelled"])
    assert len(over) >= len(before.failed) + CANCELLED
    with Load(pipeline, "meanwhile", callers=2, rate=4) as load:
        result = replay(stack, TASK_CREATED)
        assert became(result, "already sent") >= SENT
        assert became(result, "settled") == len(over)
        result = replay(stack, MX_OK, "--rate", "2000")
        assert became(result, "already sent") >= SENT
        assert became(result, "waits") == WAITING
        for topic in EVENT_TOPICS:
            if topic not in (TASK_CREATED, MX_OK):
                replay(stack, topic, "--rate", "2000")
        load.end()
    nothing_is_left(before, load)


@pytest.mark.timeout(900)
def test_group_resets_send_nothing_again_while_tasks_arrive(before: Before) -> None:
    pipeline, stack = before.pipeline, before.stack
    with Load(pipeline, "resets", callers=2, rate=2) as load:
        for stage in STAGES:
            stack.stop(f"{stage}-1")
        for stage in STAGES:
            reset_to_earliest(stack, stage)
        lag = pipeline.lag()
        assert all(lag[stage] >= SENT for stage in STAGES), lag
        stack.start(*(f"{stage}-1" for stage in STAGES))
        # The outcome of a committed record is on the next stage's topics.
        caught_up(stack)
        load.end()
    nothing_is_left(before, load)


@pytest.mark.timeout(900)
def test_a_reopening_replay_sends_exactly_the_failed_tasks_once(before: Before) -> None:
    pipeline, stack = before.pipeline, before.stack
    until(lambda: not any(pipeline.lag().values()), "all committed", 60)
    mails = len(stack.journal())
    # Other tests of the system leave no failed task.
    result = replay(stack, TASK_CREATED, "--reopen", "failed", "--status", "failed")
    assert became(result, "reopened") == result["produced"] == len(before.failed)
    started = time.monotonic()
    until(lambda: before.stand(before.failed) == {"completed"}, "all sent", 120)
    print(f"{len(before.failed)} sent {time.monotonic() - started:.1f} s after the replay")
    until(lambda: not any(pipeline.lag().values()), "all committed", 60)
    copies = pipeline.copies(before.ids)
    assert {copies[id_] for id_ in before.failed} == {1}
    assert len(stack.journal()) == mails + len(before.failed), "nothing else was sent"
    rest = set(before.ids) - set(before.failed)
    assert {id_: copies[id_] for id_ in rest} == {id_: before.copies[id_] for id_ in rest}
    now = before.now()
    assert {id_: now[id_] for id_ in rest} == {id_: before.statuses[id_] for id_ in rest}
    # However often.
    assert replay(stack, TASK_CREATED, "--reopen", "failed")["produced"] == 0
    assert became(replay(stack, "mx.ok", "--reopen", "failed"), "reopened") == 0
    until(lambda: not any(pipeline.lag().values()), "all committed", 60)
    assert len(stack.journal()) == mails + len(before.failed)
