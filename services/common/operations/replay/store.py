"""The table `replays`: how far each replay is. Blocks. Every function raises `sqlalchemy.exc.DBAPIError`."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine

from services.common.database.transactions import transaction
from services.common.operations.errors import NotFound
from services.common.operations.replay.options import ReplayOptions
from services.common.operations.replay.records import OffsetRange
from services.common.operations.replay.replay_decision import ReplayAction

__all__ = [
    "Counts",
    "Replay",
    "begin_replay",
    "count_produced",
    "count_refused",
    "find_replay",
    "insert_replay",
    "load_replay",
    "new_replay_id",
    "save_replay",
    "unfinished_replays",
]

Counts = Counter[tuple[str, str, str]]
"""Numbers of records by their task's status and reason and by the replay's action."""


def count_produced(counts: Counts) -> int:
    """Return how many of the records are produced again."""
    return sum(number for (_, _, action), number in counts.items() if ReplayAction(action).produces)


def count_refused(counts: Counts) -> int:
    """Return how many of the records Kafka refused."""
    return sum(
        number for (_, _, action), number in counts.items() if ReplayAction(action) is ReplayAction.REFUSED
    )


@dataclass(slots=True)
class Replay:
    """One replay. `options` are a ReplayOptions as JSON; `epoch` is the epoch of the tasks that it reopens.

    `stamp` is when its row was written last. Only a process that has read the last stamp may write the row.
    """

    id: str
    topic: str
    options: Mapping[str, Any]
    epoch: int
    ranges: dict[int, OffsetRange]
    counts: Counts = field(default_factory=Counter)
    finished: bool = False
    stamp: datetime = datetime.min

    @property
    def left(self) -> int:
        """How many offsets are still to be read."""
        return sum(range_.left for range_ in self.ranges.values())


def new_replay_id(now: datetime) -> str:
    """Return an id that sorts by time and is short enough to type."""
    return f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def begin_replay(
    engine: Engine, options: ReplayOptions, ranges: Mapping[int, OffsetRange], now: datetime
) -> Replay:
    """Insert and return a new replay of these ranges. `now` is in its id, the present time is its epoch."""
    epoch = time.time_ns() // 1_000_000
    replay = Replay(new_replay_id(now), options.topic, options.as_json(), epoch, dict(ranges))
    insert_replay(engine, replay)
    return replay


def insert_replay(engine: Engine, replay: Replay) -> None:
    """Insert a replay that begins."""
    now = _now()

    def insert(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT INTO replays (id, topic, arguments, epoch, positions, counts, started_at, updated_at,"
            " finished_at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, NULL)"
            " ON DUPLICATE KEY UPDATE updated_at = VALUES(updated_at)",
            (replay.id, replay.topic, json.dumps(replay.options), replay.epoch, *_progress(replay), now, now),
        )

    transaction(engine, insert)
    replay.stamp = now


def load_replay(engine: Engine, id_: str) -> Replay | None:
    """Return the replay with this id, None where there is none."""
    columns = "topic, arguments, epoch, positions, counts, finished_at, updated_at"
    query = f"SELECT {columns} FROM replays WHERE id = %s"
    row = transaction(engine, lambda c: c.exec_driver_sql(query, (id_,)).one_or_none())
    if row is None:
        return None
    topic, options, epoch, positions, counts, finished_at, stamp = row
    return Replay(
        id_,
        topic,
        json.loads(options),
        epoch,
        {int(number): OffsetRange(*range_) for number, range_ in json.loads(positions).items()},
        Counter({(status, reason, action): n for status, reason, action, n in json.loads(counts)}),
        finished_at is not None,
        stamp,
    )


def find_replay(engine: Engine, id_: str) -> Replay:
    """Return the replay with this id. Raises NotFound, which names unfinished replays."""
    replay = load_replay(engine, id_)
    if replay is None:
        unfinished = ", ".join(unfinished_replays(engine)) or "none"
        raise NotFound(f"there is no replay {id_}; those that are not at their end: {unfinished}")
    return replay


def save_replay(engine: Engine, replay: Replay) -> bool:
    """Write how far a replay is. Returns False where another process has continued it meanwhile."""
    now, known = _now(), replay.stamp

    def update(connection: Connection) -> int:
        # If the connection dies during the commit, the update is repeated, and the row may have its own
        # stamp.
        updated: int = connection.exec_driver_sql(
            "UPDATE replays SET positions = %s, counts = %s, updated_at = %s, finished_at = %s"
            " WHERE id = %s AND updated_at IN (%s, %s)",
            (*_progress(replay), now, now if replay.finished else None, replay.id, known, now),
        ).rowcount
        return updated

    if not transaction(engine, update):
        return False
    replay.stamp = now
    return True


def unfinished_replays(engine: Engine, limit: int = 5) -> list[str]:
    """Return the ids of unfinished replays, the latest first."""
    query = f"SELECT id FROM replays WHERE finished_at IS NULL ORDER BY id DESC LIMIT {limit:d}"
    return [id_ for (id_,) in transaction(engine, lambda c: c.exec_driver_sql(query).all())]


def _progress(replay: Replay) -> tuple[str, str]:
    counts = [[*key, number] for key, number in sorted(replay.counts.items())]
    return json.dumps(replay.ranges), json.dumps(counts)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
