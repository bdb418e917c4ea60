"""The table `replays`: how far each replay is. Blocks. Every function raises `sqlalchemy.exc.DBAPIError`."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.dialects import mysql

from services.common.database.tables import replays
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

    row = mysql.insert(replays).values(
        id=replay.id,
        topic=replay.topic,
        arguments=replay.options,
        epoch=replay.epoch,
        **_progress(replay),
        started_at=now,
        updated_at=now,
    )
    # If the connection dies during the commit, the insert is repeated.
    insert = row.on_duplicate_key_update(updated_at=now)
    transaction(engine, lambda connection: connection.execute(insert))
    replay.stamp = now


def load_replay(engine: Engine, id_: str) -> Replay | None:
    """Return the replay with this id, None where there is none."""
    query = select(replays).where(replays.c.id == id_)
    row = transaction(engine, lambda connection: connection.execute(query).one_or_none())
    if row is None:
        return None
    return Replay(
        id_,
        row.topic,
        row.arguments,
        row.epoch,
        {int(number): OffsetRange(*range_) for number, range_ in row.positions.items()},
        Counter({(status, reason, action): n for status, reason, action, n in row.counts}),
        row.finished_at is not None,
        row.updated_at,
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
    now = _now()
    # If the connection dies during the commit, the update is repeated, and the row may have its own stamp.
    saved = (
        update(replays)
        .where(replays.c.id == replay.id, replays.c.updated_at.in_((replay.stamp, now)))
        .values(**_progress(replay), updated_at=now, finished_at=now if replay.finished else None)
    )
    if not transaction(engine, lambda connection: connection.execute(saved).rowcount):
        return False
    replay.stamp = now
    return True


def unfinished_replays(engine: Engine, limit: int = 5) -> list[str]:
    """Return the ids of unfinished replays, the latest first."""
    unfinished = select(replays.c.id).where(replays.c.finished_at.is_(None))
    query = unfinished.order_by(replays.c.id.desc()).limit(limit)
    return list(transaction(engine, lambda connection: connection.scalars(query).all()))


def _progress(replay: Replay) -> dict[str, Any]:
    counts = [[*key, number] for key, number in sorted(replay.counts.items())]
    return {"positions": replay.ranges, "counts": counts}


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
