"""Which recipients' domains the records are of that the sender has not committed. Blocks.

A commit waits for the first record of its partition that is not finished. So a mail that hangs keeps
all those behind it counted as lag, though they are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2 as pb
from services.cli.lag.sample import Place, Sample
from services.cli.topic_log import At, Log
from services.common.config import Settings
from services.common.database.bulk import placeholders
from services.common.database.transactions import transaction
from services.common.events import DECODERS, Undecodable
from services.common.kafka.headers import parse_delayed_headers
from services.common.kafka.records import MalformedHeaders, readable_headers
from services.common.kafka.topics import MX_OK, Names, delay_of

__all__ = ["MOST", "State", "Waiting", "domains", "figures"]

MOST = 1000
"""Records that are looked at in each partition at most, from the first that is not committed on."""

_UNDER_WAY = ("sending", "released")


class Waiting(NamedTuple):
    """A record that is not committed and due: its mail, and since when (Unix seconds) it could be sent."""

    task_id: bytes
    domain: str
    epoch: int
    attempt: int
    since: float


class State(NamedTuple):
    """What `deliveries` says of a task."""

    state: str
    epoch: int
    attempt: int


@dataclass(slots=True)
class _Domain:
    sending: int = 0
    waiting: int = 0
    finished: int = 0
    since: float | None = None


def domains(settings: Settings, engine: Engine, now: Sample) -> list[dict[str, Any]]:
    """Return a row for each domain of a record that the sender has not committed, those that hold most first.

    Raises `confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
    """
    records = list(_records(settings, now))
    states = transaction(engine, lambda connection: _states(connection, {one.task_id for one in records}))
    return figures(records, states, now.at)


def figures(records: Iterable[Waiting], states: Mapping[bytes, State], at: float) -> list[dict[str, Any]]:
    """Return `domain`, `sending` (claimed: it is sent, or waits for a session), `waiting` (for a claim),
    `finished` (its commit waits for those before it) and `oldest_seconds`, the oldest other's age.
    """
    found: dict[str, _Domain] = {}
    for record in records:
        domain, state = found.setdefault(record.domain, _Domain()), states.get(record.task_id)
        if state is not None and _finished(record, state):
            domain.finished += 1
            continue
        if state is not None and state.state == "sending":
            domain.sending += 1
        else:
            domain.waiting += 1
        domain.since = record.since if domain.since is None else min(domain.since, record.since)
    rows = [
        {
            "domain": name,
            "sending": domain.sending,
            "waiting": domain.waiting,
            "finished": domain.finished,
            "oldest_seconds": None if domain.since is None else max(0.0, round(at - domain.since, 3)),
        }
        for name, domain in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["sending"], -row["waiting"], -row["finished"], row["domain"]))


def _finished(record: Waiting, state: State) -> bool:
    if state.epoch != record.epoch:
        return state.epoch > record.epoch
    return state.state not in _UNDER_WAY and state.attempt >= record.attempt


def _records(settings: Settings, now: Sample) -> Iterator[Waiting]:
    names = Names(settings.topic_prefix)
    wanted = [place for place in now.ends if _read_from(place, now) and now.waiting("sender", place)]
    if not wanted:
        return
    log = Log(settings, sorted({names.topic(place.topic) for place in wanted}))
    try:
        ends = {}
        for place in wanted:
            at, first = At(names.topic(place.topic), place.partition), now.position("sender", place)
            log.next[at] = max(log.start[at], first)
            ends[at] = min(now.ends[place], first + MOST)
        for messages in log.read(ends, MOST):
            for message in messages:
                topic = (message.topic() or "").removeprefix(names.prefix)
                if (record := _record(topic, message, now.at)) is not None:
                    yield record
    finally:
        log.close()


def _read_from(place: Place, now: Sample) -> bool:
    if place.topic == MX_OK:
        return True
    head = now.heads.get(("sender", place))
    delayed = place.topic.startswith("sender.") and delay_of(place.topic) is not None
    # The head is the first that is due.
    return delayed and head is not None and head.due is not None and head.due <= now.at


def _record(topic: str, message: Any, at: float) -> Waiting | None:
    attempt, since = 1, message.timestamp()[1] / 1000
    try:
        if delay_of(topic) is not None:
            back = parse_delayed_headers(readable_headers(message))
            attempt, since, topic = back.attempt, back.due_at_ms / 1000, back.origin.topic
        event = DECODERS[topic](message.value()) if topic == MX_OK else None
    except (MalformedHeaders, Undecodable):
        return None
    if not isinstance(event, pb.MxOk) or since > at:
        return None
    return Waiting(event.task.id, event.task.domain, event.epoch, attempt, since)


def _states(connection: Connection, ids: Iterable[bytes]) -> dict[bytes, State]:
    found: dict[bytes, State] = {}
    for part in _parts(sorted(ids)):
        ids_of_part = placeholders(len(part))
        query = f"SELECT task_id, state, epoch, attempt FROM deliveries WHERE task_id IN ({ids_of_part})"
        for row in connection.exec_driver_sql(query, tuple(part)):
            found[bytes(row.task_id)] = State(row.state, row.epoch, row.attempt)
    return found


def _parts(ids: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(ids), 500):
        yield ids[start : start + 500]
