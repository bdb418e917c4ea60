"""Merges a batch of events into `tasks`, as `taskstore.upsert` would merge their rows, with less work.

Nearly all tasks have a row with its mail, since `Create` wrote it, and nearly each event outranks the row.
One UPDATE then does it, and the number of its rows shows whether all did. Otherwise the upsert follows
(ADR 39).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import Connection

from services.common.database.bulk import execute_rows, select_rows
from services.common.database.literals import literal_list
from services.common.database.times import FROM_MICROS
from services.common.events import Event, task_id
from services.common.fold import EPOCH_SHIFT, NEW_TASK, Progress, delta, join, progress
from services.common.taskstore import upsert

__all__ = ["merge_events"]

_PART = 500
_FIELDS = (*Progress._fields, "life")
_ROW = f"ROW({','.join(['%s'] * len(_FIELDS))})"
_SET = ", ".join(
    (
        *(
            f"t.{name} = v.{name}"
            for name in ("status", "epoch", "attempts", "reason", "reply", "message_id", "version")
        ),
        f"t.next_attempt_at = {FROM_MICROS % 'v.next_at_us'}",
        f"t.updated_at = {FROM_MICROS % 'v.at_us'}",
    )
)
# An event of the same epoch with fewer attempts keeps those of the row: the upsert does that.
_OUTRANKED = (
    "t.id = v.id AND t.created_at IS NOT NULL AND t.version < v.version"
    f" AND (t.attempts <= v.attempts OR t.version >> {EPOCH_SHIFT} <> v.life)"
)
_TAIL = f") AS v({', '.join(_FIELDS)}) STRAIGHT_JOIN tasks AS t ON {_OUTRANKED} SET {_SET}"


def merge_events(connection: Connection, events: Sequence[Event]) -> None:
    """Merge the events into their tasks' rows. Runs in the caller's transaction, and blocks.

    Locks the rows that an event may change in the order of their ids. Raises as `upsert` does.
    """
    rows = _joined(events)
    new = {row.id for row in rows if row.version == NEW_TASK}
    others = new.difference(_present(connection, new))
    later = [row for row in rows if row.id not in new]
    if not _update(connection, later):
        others.update(row.id for row in later)
    if others:
        upsert(connection, [delta(event) for event in events if task_id(event) in others])


def _joined(events: Sequence[Event]) -> list[Progress]:
    """Return each task's progress, in the order of the tasks' ids."""
    joined: dict[bytes, Progress] = {}
    for event in events:
        after = progress(event)
        before = joined.get(after.id)
        joined[after.id] = after if before is None else join(before, after)
    return [joined[id_] for id_ in sorted(joined)]


def _update(connection: Connection, rows: Sequence[Progress]) -> bool:
    """Write the rows that outrank the stored ones, and return whether all do.

    MariaDB has no such UPDATE: there it writes nothing and returns False.
    """
    if connection.dialect.is_mariadb:  # type: ignore[attr-defined]
        return False
    values = [(*row, row.version >> EPOCH_SHIFT) for row in rows]
    return execute_rows(connection, "UPDATE (VALUES", values, _TAIL, row=_ROW) == len(rows)


def _present(connection: Connection, ids: Collection[bytes]) -> Iterator[bytes]:
    """Yield those of the tasks whose rows have their mail. No row loses it, so this needs no lock."""
    ordered = sorted(ids)
    for start in range(0, len(ordered), _PART):
        part = ordered[start : start + _PART]
        where = f"FROM tasks WHERE id IN ({literal_list(part)}) AND created_at IS NOT NULL"
        [(count,)] = select_rows(connection, f"SELECT COUNT(*) {where}")
        if count == len(part):
            yield from part
        elif count:
            yield from (bytes(id_) for (id_,) in select_rows(connection, f"SELECT id {where}"))
