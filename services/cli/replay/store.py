"""The table of replays: how far each one is. Blocks; everything raises `sqlalchemy.exc.DBAPIError`."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine

from services.cli.replay.source import Span
from services.common.database.transactions import transaction

__all__ = ["Counts", "Replay", "create", "load", "new_id", "save", "unfinished"]

Counts = Counter[tuple[str, str, str]]
"""How many records, by their task's status and reason and by what becomes of them."""


@dataclass(slots=True)
class Replay:
    """One replay. `arguments` are what it was asked for, as JSON can hold it; `epoch` is of what it reopens.

    `stamp` is the time of its last line in the table; whoever writes it must have read the one before.
    """

    id: str
    topic: str
    arguments: Mapping[str, Any]
    epoch: int
    positions: dict[int, Span]
    counts: Counts = field(default_factory=Counter)
    finished: bool = False
    stamp: datetime = datetime.min

    @property
    def left(self) -> int:
        """How many offsets are still to be read."""
        return sum(span.left for span in self.positions.values())


def new_id(now: datetime) -> str:
    """Return an id that sorts by time and that people can copy."""
    return f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def create(engine: Engine, replay: Replay) -> None:
    """Insert a replay that begins."""
    now = _now()

    def insert(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT INTO replays (id, topic, arguments, epoch, positions, counts, started_at, updated_at,"
            " finished_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, NULL)"
            " ON DUPLICATE KEY UPDATE updated_at = VALUES(updated_at)",
            (replay.id, replay.topic, json.dumps(replay.arguments), replay.epoch, *_state(replay), now, now),
        )

    transaction(engine, insert)
    replay.stamp = now


def load(engine: Engine, id_: str) -> Replay | None:
    """Return the replay of that id, None where there is none."""
    columns = "topic, arguments, epoch, positions, counts, finished_at, updated_at"
    query = f"SELECT {columns} FROM replays WHERE id = %s"
    row = transaction(engine, lambda c: c.exec_driver_sql(query, (id_,)).one_or_none())
    if row is None:
        return None
    topic, arguments, epoch, positions, counts, finished_at, stamp = row
    return Replay(
        id_,
        topic,
        json.loads(arguments),
        epoch,
        {int(number): Span(*span) for number, span in json.loads(positions).items()},
        Counter({(status, reason, what): n for status, reason, what, n in json.loads(counts)}),
        finished_at is not None,
        stamp,
    )


def save(engine: Engine, replay: Replay) -> bool:
    """Write how far a replay is; False where another process has gone on with it since."""
    now, known = _now(), replay.stamp

    def update(connection: Connection) -> int:
        # The stamp may be this very call's: it is made again where the connection died while it committed.
        done: int = connection.exec_driver_sql(
            "UPDATE replays SET positions = %s, counts = %s, updated_at = %s, finished_at = %s"
            " WHERE id = %s AND updated_at IN (%s, %s)",
            (*_state(replay), now, now if replay.finished else None, replay.id, known, now),
        ).rowcount
        return done

    if not transaction(engine, update):
        return False
    replay.stamp = now
    return True


def unfinished(engine: Engine, limit: int = 5) -> list[str]:
    """Return the ids of the replays that did not come to their end, the latest first."""
    query = f"SELECT id FROM replays WHERE finished_at IS NULL ORDER BY id DESC LIMIT {limit:d}"
    return [id_ for (id_,) in transaction(engine, lambda c: c.exec_driver_sql(query).all())]


def _state(replay: Replay) -> tuple[str, str]:
    counts = [[*key, number] for key, number in sorted(replay.counts.items())]
    return json.dumps(replay.positions), json.dumps(counts)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
