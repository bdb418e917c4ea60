"""Whose mails the sender has not committed: the recipients' domains of these records. Blocks.

A commit waits for the first unfinished record of its partition. So while one mail hangs, all records behind
it count as lag, even if their mails are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, select

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.database.tables import deliveries
from services.common.database.transactions import transaction
from services.common.events import DECODERS, Undecodable
from services.common.kafka.headers import parse_delayed_headers, readable_headers
from services.common.kafka.records import MalformedHeaders
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import MX_OK, Names, delay_of
from services.common.operations.lag.sampler import LagSample
from services.common.operations.topic_reader import TopicReader

__all__ = ["MAX_RECORDS", "DeliveryProgress", "UncommittedMail", "domain_rows", "read_domains"]

MAX_RECORDS = 1000
"""The most records of each partition that are read, from its first uncommitted one on."""

_UNDER_WAY = ("sending", "released")
_PROGRESS = select(deliveries.c.task_id, deliveries.c.state, deliveries.c.epoch, deliveries.c.attempt)


class UncommittedMail(NamedTuple):
    """A due record that the sender has not committed: its mail, and since when it is due (Unix seconds)."""

    task_id: bytes
    domain: str
    epoch: int
    attempt: int
    since: float


class DeliveryProgress(NamedTuple):
    """How far a task's delivery is, by its row in `deliveries`."""

    state: str
    epoch: int
    attempt: int


@dataclass(slots=True)
class _DomainCounts:
    sending: int = 0
    waiting: int = 0
    finished: int = 0
    since: float | None = None


def read_domains(settings: Settings, engine: Engine, now: LagSample) -> list[dict[str, Any]]:
    """Return the `domain_rows` of all records that the sender has not committed.

    Raises `confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
    """
    mails = list(_read_mails(settings, now))
    progress = transaction(engine, lambda connection: _progress(connection, {one.task_id for one in mails}))
    return domain_rows(mails, progress, now.at)


def domain_rows(
    mails: Iterable[UncommittedMail], progress: Mapping[bytes, DeliveryProgress], at: float
) -> list[dict[str, Any]]:
    """Return a row for each domain, those with most claims first. Pure. `at` is the time, Unix seconds.

    `sending` mails have a claim: they are sent or wait for a session. `waiting` ones wait for a claim.
    `finished` ones wait for the commit of those before them. `oldest_seconds` is the age of the oldest
    unfinished one.
    """
    found: dict[str, _DomainCounts] = {}
    for mail in mails:
        counts, delivery = found.setdefault(mail.domain, _DomainCounts()), progress.get(mail.task_id)
        if delivery is not None and _is_finished(mail, delivery):
            counts.finished += 1
            continue
        if delivery is not None and delivery.state == "sending":
            counts.sending += 1
        else:
            counts.waiting += 1
        counts.since = mail.since if counts.since is None else min(counts.since, mail.since)
    rows = [
        {
            "domain": name,
            "sending": counts.sending,
            "waiting": counts.waiting,
            "finished": counts.finished,
            "oldest_seconds": None if counts.since is None else max(0.0, round(at - counts.since, 3)),
        }
        for name, counts in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["sending"], -row["waiting"], -row["finished"], row["domain"]))


def _is_finished(mail: UncommittedMail, delivery: DeliveryProgress) -> bool:
    if delivery.epoch != mail.epoch:
        return delivery.epoch > mail.epoch
    return delivery.state not in _UNDER_WAY and delivery.attempt >= mail.attempt


def _read_mails(settings: Settings, now: LagSample) -> Iterator[UncommittedMail]:
    names = Names(settings.topic_prefix)
    wanted = [one for one in now.ends if _has_due_mails(one, now) and now.waiting("sender", one)]
    if not wanted:
        return
    topics = TopicReader(settings, sorted({names.topic(partition.topic) for partition in wanted}))
    try:
        ends = {}
        for partition in wanted:
            full = TopicPartition(names.topic(partition.topic), partition.partition)
            first = now.position("sender", partition)
            topics.next[full] = max(topics.start[full], first)
            ends[full] = min(now.ends[partition], first + MAX_RECORDS)
        for messages in topics.read(ends, MAX_RECORDS):
            for message in messages:
                topic = (message.topic() or "").removeprefix(names.prefix)
                if (mail := _mail(topic, message, now.at)) is not None:
                    yield mail
    finally:
        topics.close()


def _has_due_mails(partition: TopicPartition, now: LagSample) -> bool:
    if partition.topic == MX_OK:
        return True
    delay = delay_of(partition.topic)
    delayed = delay is not None and partition.topic == Names().delay("sender", delay)
    # The oldest record is the first that becomes due.
    oldest = now.oldest.get(("sender", partition))
    return delayed and oldest is not None and oldest.due is not None and oldest.due <= now.at


def _mail(topic: str, message: Any, at: float) -> UncommittedMail | None:
    attempt, since = 1, message.timestamp()[1] / 1000
    try:
        if delay_of(topic) is not None:
            delayed = parse_delayed_headers(readable_headers(message))
            attempt, since, topic = delayed.attempt, delayed.due_at_ms / 1000, delayed.origin.topic
        event = DECODERS[topic](message.value()) if topic == MX_OK else None
    except (MalformedHeaders, Undecodable):
        return None
    if not isinstance(event, pb.MxOk) or since > at:
        return None
    return UncommittedMail(event.task.id, event.task.domain, event.epoch, attempt, since)


def _progress(connection: Connection, ids: Iterable[bytes]) -> dict[bytes, DeliveryProgress]:
    found: dict[bytes, DeliveryProgress] = {}
    for part in _parts(sorted(ids)):
        for row in connection.execute(_PROGRESS.where(deliveries.c.task_id.in_(part))):
            found[bytes(row.task_id)] = DeliveryProgress(row.state, row.epoch, row.attempt)
    return found


def _parts(ids: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(ids), 500):
        yield ids[start : start + 500]
