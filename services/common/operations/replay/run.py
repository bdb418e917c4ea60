"""A replay from its first record to its last. Blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from confluent_kafka import KafkaError
from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import Undecodable, task_id
from services.common.kafka.topics import MX_OK, Names
from services.common.operations import installation
from services.common.operations.errors import NotFound, OperationError
from services.common.operations.record_producer import RecordProducer
from services.common.operations.replay import store
from services.common.operations.replay.options import ReplayOptions, parse_options
from services.common.operations.replay.records import (
    DecodedRecord,
    OffsetRange,
    ReplayedRecord,
    decode,
    read_batches,
    replayed,
)
from services.common.operations.replay.replay_decision import (
    ReplayAction,
    ReplayDecision,
    decide_delayed,
    decide_work,
    wait_for_send_at,
)
from services.common.operations.replay.store import Replay
from services.common.operations.replay.task_state import new_task_state, read_task_states
from services.common.rate import Rate

__all__ = ["BATCH", "DecidedRecord", "OnProgress", "ReplayTakenOver", "decide_batch", "run"]

OnProgress = Callable[[int], None]
"""Takes, now and then, how many offsets are left."""
OnRefused = Callable[[ReplayedRecord, str], None]
"""Takes a record that Kafka refuses, and the reason."""

BATCH = 500
"""Records that are decided at a time."""

_SAVE_SECONDS = 1.0


class ReplayTakenOver(OperationError):
    """Another process has continued this replay."""


class DecidedRecord(NamedTuple):
    """A record with its decision. `decoded` is None where it cannot be decoded."""

    record: ReplayedRecord
    decoded: DecodedRecord | None
    status: str
    reason: str
    decision: ReplayDecision

    @property
    def kind(self) -> tuple[str, str, str]:
        """What `Counts` counts it by."""
        return (self.status, self.reason, self.decision.action.value)


def decide_batch(
    engine: Engine, options: ReplayOptions, new_epoch: int, batch: Sequence[ReplayedRecord]
) -> list[DecidedRecord]:
    """Decide about records of one topic by their tasks' present states."""
    task_filter, reopen = options.task_filter(), frozenset(options.reopen)
    decoded = [_decode(record) for record in batch]
    tasks = read_task_states(engine, [task_id(one.event) for one in decoded if one is not None])
    now_us = time.time_ns() // 1000
    decided = []
    for record, one in zip(batch, decoded, strict=True):
        if one is None:
            decision = ReplayDecision(ReplayAction.UNDECODABLE, 0)
            decided.append(DecidedRecord(record, None, "", "", decision))
            continue
        id_, epoch = task_id(one.event), one.event.epoch
        task = tasks.get(id_) or new_task_state(one.event)
        if not task_filter.matches(id_, task):
            decision = ReplayDecision(ReplayAction.NOT_SELECTED, epoch)
            decided.append(DecidedRecord(record, one, "", "", decision))
            continue
        if one.delayed is not None:
            decision = decide_delayed(epoch, task, due_ms=one.delayed.due_at_ms, now_ms=now_us // 1000)
        elif isinstance(one.event, pb.TaskCreated | pb.MxOk):
            to_sender = record.topic == MX_OK
            decision = decide_work(
                epoch, task, reopen=reopen, new_epoch=new_epoch, now_us=now_us, to_sender=to_sender
            )
            decision = wait_for_send_at(decision, epoch, one.event.send_at_us, now_us)
        else:
            decision = ReplayDecision(ReplayAction.REPUBLISH, epoch)
        decided.append(DecidedRecord(record, one, task.status, task.reason, decision))
    return decided


def run(
    settings: Settings,
    engine: Engine,
    replay: Replay,
    stop: threading.Event,
    on_progress: OnProgress,
    *,
    on_refused: OnRefused = lambda record, why: None,
) -> bool:
    """Continue a replay to its end, or until `stop` is set. Returns whether it is at its end.

    Every counted record is acked. A record that Kafka refuses for good counts as REFUSED, and `on_refused`
    gets it. The position is stored about once a second and at the end. After a crash the replay repeats what
    it did since, which is harmless. Raises NotFound, ReplayTakenOver, `confluent_kafka.KafkaException` and
    `sqlalchemy.exc.DBAPIError`.
    """
    options = parse_options(replay.options)
    rate = Rate(options.rate, burst=int(options.rate / 20))
    names = Names(settings.topic_prefix)
    delay_topic = _first_delay_topic(settings) if replay.topic == MX_OK else ""
    producer = RecordProducer(settings, f"replay-{replay.id}")
    saved = time.monotonic()
    # A batch is at most a second's worth of records, so that none takes long.
    limit = max(1, min(BATCH, int(options.rate)))
    for batch in read_batches(settings, replay.topic, dict(replay.ranges), limit):
        done: list[DecidedRecord] = []
        refusals: dict[int, KafkaError] = {}
        for one in decide_batch(engine, options, replay.epoch, batch):
            if one.decision.action.produces and one.decoded is not None:
                if not _wait_for_turn(rate, stop):
                    break
                record = replayed(one.record, one.decoded, one.decision, replay.id, delay_topic)
                producer.put(
                    names.topic(record.topic),
                    record.key,
                    record.value,
                    record.headers,
                    on_refusal=partial(refusals.__setitem__, len(done)),
                )
            done.append(one)
        producer.flush()
        for index, why in sorted(refusals.items()):
            one = done[index]
            done[index] = one._replace(decision=one.decision._replace(action=ReplayAction.REFUSED))
            on_refused(one.record, why.str())
        _advance(replay, done)
        on_progress(replay.left)
        if stop.is_set():
            _save(engine, replay)
            return False
        if time.monotonic() - saved > _SAVE_SECONDS:
            _save(engine, replay)
            saved = time.monotonic()
    # The last offsets of a partition may be missing.
    replay.ranges = {number: OffsetRange(range_.end, range_.end) for number, range_ in replay.ranges.items()}
    replay.finished = True
    _save(engine, replay)
    on_progress(0)
    return True


def _decode(record: ReplayedRecord) -> DecodedRecord | None:
    try:
        return decode(record)
    except Undecodable:
        return None


def _wait_for_turn(rate: Rate, stop: threading.Event) -> bool:
    """Wait until the next record may be produced. Returns False where the replay is to stop instead."""
    wait = rate.wait(time.monotonic())
    if stop.wait(wait) if wait > 0 else stop.is_set():
        return False
    rate.took(time.monotonic())
    return True


def _advance(replay: Replay, done: Sequence[DecidedRecord]) -> None:
    for one in done:
        number = one.record.partition
        replay.ranges[number] = replay.ranges[number]._replace(next=one.record.offset + 1)
        replay.counts[one.kind] += 1


def _save(engine: Engine, replay: Replay) -> None:
    if not store.save_replay(engine, replay):
        raise ReplayTakenOver(f"another process has gone on with replay {replay.id}")


def _first_delay_topic(settings: Settings) -> str:
    """Return the bare name of the sender's first delay topic. Raises NotFound where it has none."""
    delays = installation.current_delays(settings, ["sender"])["sender"]
    if not delays:
        raise NotFound("the sender has no delay topic: 'postroad topics apply' creates them")
    return Names().delay("sender", delays[0])
