"""A replay from its first record to its last. Blocks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from confluent_kafka import KafkaError
from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.cli import installation
from services.cli.errors import NOT_FOUND, Failure
from services.cli.replay import store
from services.cli.replay.asked import Asked, asked_from
from services.cli.replay.decide import Decision, What, delayed, in_time, working
from services.cli.replay.records import Read, Seen, again, see
from services.cli.replay.source import Span, batches
from services.cli.replay.standing import first_seen
from services.cli.replay.standings import standings
from services.cli.replay.store import Counts, Replay
from services.cli.sink import Sink
from services.common.config import Settings
from services.common.events import Undecodable, task_id
from services.common.kafka.topics import MX_OK, Names
from services.common.rate import Rate

__all__ = ["MOST_TASKS", "Superseded", "Survey", "judge", "run", "survey"]

Tick = Callable[[int], None]
"""Told how many offsets are left, now and then."""
Refused = Callable[[Read, str], None]
"""Told which record cannot be produced, and why."""

MOST_TASKS = 1_000_000
"""How many tasks a survey tells apart at most: they take some 100 bytes each."""

_BATCH = 500
_SAVE_SECONDS = 1.0


class Superseded(RuntimeError):
    """Another process has gone on with this replay."""


class Judged(NamedTuple):
    """A record and what becomes of it. `seen` is None where it could not be decoded."""

    record: Read
    seen: Seen | None
    status: str
    reason: str
    decision: Decision


def judge(engine: Engine, asked: Asked, fresh: int, batch: Sequence[Read]) -> list[Judged]:
    """Decide about records of one topic, by how their tasks stand now. `fresh`: the replay's epoch."""
    selection, reopen = asked.selection(), frozenset(asked.reopen)
    seen = [_seen(record) for record in batch]
    tasks = standings(engine, [task_id(s.event) for s in seen if s is not None])
    now_us = time.time_ns() // 1000
    judged = []
    for record, one in zip(batch, seen, strict=True):
        if one is None:
            judged.append(Judged(record, None, "", "", Decision(What.UNDECODABLE, 0)))
            continue
        id_, epoch = task_id(one.event), one.event.epoch
        task = tasks.get(id_) or first_seen(one.event)
        if not selection.takes(id_, task):
            judged.append(Judged(record, one, "", "", Decision(What.NOT_SELECTED, epoch)))
            continue
        if one.back is not None:
            decision = delayed(epoch, task, due_ms=one.back.due_at_ms, now_ms=now_us // 1000)
        elif isinstance(one.event, pb.TaskCreated | pb.MxOk):
            sends = record.topic == MX_OK
            decision = working(epoch, task, reopen=reopen, fresh=fresh, now_us=now_us, sends=sends)
            decision = in_time(decision, epoch, one.event.send_at_us, now_us)
        else:
            decision = Decision(What.AGAIN, epoch)
        judged.append(Judged(record, one, task.status, task.reason, decision))
    return judged


class Survey(NamedTuple):
    """How many records there are, and of how many tasks; `tasks` is None where those are too many to tell."""

    counts: Counts
    tasks: Counts | None


def survey(settings: Settings, engine: Engine, asked: Asked, todo: Mapping[int, Span], tick: Tick) -> Survey:
    """Return what a replay of `todo` would do if it ran now. Changes nothing."""
    fresh = time.time_ns() // 1_000_000
    counts: Counts = Counter()
    tasks = Tasks(MOST_TASKS)
    left = sum(span.left for span in todo.values())
    for batch in batches(settings, asked.topic, todo, _BATCH):
        judged = judge(engine, asked, fresh, batch)
        counts.update(_key(one) for one in judged)
        tasks.add((_key(one), task_id(one.seen.event)) for one in judged if one.seen is not None)
        left -= len(batch)
        tick(left)
    tick(0)
    return Survey(counts, tasks.counts())


class Tasks:
    """Tells how many tasks, not more than `most` in all, the records of each kind are of."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ids: dict[tuple[str, str, str], set[bytes]] | None = {}

    def add(self, seen: Iterable[tuple[tuple[str, str, str], bytes]]) -> None:
        """Count the task with this id, of a record of this kind."""
        for kind, id_ in seen:
            if self._ids is None:
                return
            self._ids.setdefault(kind, set()).add(id_)
            if sum(map(len, self._ids.values())) > self._most:
                self._ids = None

    def counts(self) -> Counts | None:
        """Return the number of tasks of each kind; None where there were more than can be told."""
        return None if self._ids is None else Counter({kind: len(ids) for kind, ids in self._ids.items()})


def run(
    settings: Settings,
    engine: Engine,
    replay: Replay,
    stop: threading.Event,
    tick: Tick,
    *,
    refused: Refused = lambda record, why: None,
) -> bool:
    """Go on with a replay to its end, or until `stop` is set; return whether it has come to its end.

    What is counted as done is on the topic. A record that cannot be produced is counted as REFUSED, and
    `refused` is told. The replay's position is stored about once a second and at the end; killed in between,
    it repeats what it did since, which is harmless. Raises KafkaException, DBAPIError and Superseded.
    """
    asked = asked_from(replay.arguments)
    pace = Rate(asked.rate, burst=int(asked.rate / 20))
    names = Names(settings.topic_prefix)
    delay_topic = _delay_topic(settings) if replay.topic == MX_OK else ""
    sink = Sink(settings, f"replay-{replay.id}")
    saved = time.monotonic()
    # A second's worth at most, so that a batch is never long under way.
    for batch in batches(
        settings, replay.topic, dict(replay.positions), max(1, min(_BATCH, int(asked.rate)))
    ):
        done: list[Judged] = []
        refusals: dict[int, KafkaError] = {}
        for one in judge(engine, asked, replay.epoch, batch):
            if one.decision.what.produced and one.seen is not None:
                if not _wait(pace, stop):
                    break
                record = again(one.record, one.seen, one.decision, replay.id, delay_topic)
                sink.put(
                    names.topic(record.topic),
                    record.key,
                    record.value,
                    record.headers,
                    refused=partial(refusals.__setitem__, len(done)),
                )
            done.append(one)
        sink.flush()
        for index, why in sorted(refusals.items()):
            one = done[index]
            done[index] = one._replace(decision=one.decision._replace(what=What.REFUSED))
            refused(one.record, why.str())
        _advance(replay, done)
        tick(replay.left)
        if stop.is_set():
            _save(engine, replay)
            return False
        if time.monotonic() - saved > _SAVE_SECONDS:
            _save(engine, replay)
            saved = time.monotonic()
    # The last offsets of a partition may be missing.
    replay.positions = {number: Span(span.end, span.end) for number, span in replay.positions.items()}
    replay.finished = True
    _save(engine, replay)
    tick(0)
    return True


def _seen(record: Read) -> Seen | None:
    try:
        return see(record)
    except Undecodable:
        return None


def _key(one: Judged) -> tuple[str, str, str]:
    return (one.status, one.reason, one.decision.what.value)


def _wait(pace: Rate, stop: threading.Event) -> bool:
    """Wait for the next one's turn; False where the replay is to stop instead."""
    wait = pace.wait(time.monotonic())
    if stop.wait(wait) if wait > 0 else stop.is_set():
        return False
    pace.took(time.monotonic())
    return True


def _advance(replay: Replay, done: Sequence[Judged]) -> None:
    for one in done:
        number = one.record.partition
        replay.positions[number] = replay.positions[number]._replace(next=one.record.offset + 1)
        replay.counts[_key(one)] += 1


def _save(engine: Engine, replay: Replay) -> None:
    if not store.save(engine, replay):
        raise Superseded(f"another process has gone on with replay {replay.id}")


def _delay_topic(settings: Settings) -> str:
    """Return the bare name of the sender's first delay topic. Raises Failure where it has none."""
    delays = installation.delays(settings, ["sender"])["sender"]
    if not delays:
        raise Failure("the sender has no delay topic: 'postroad topics apply' creates them", NOT_FOUND)
    return Names().delay("sender", delays[0])
