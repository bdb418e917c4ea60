"""What was folded, written into the rebuilt tables.

All functions work on the caller's connection, inside its transaction, and block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from services.cli.rebuild.deliveries import Told, restored
from services.cli.rebuild.folding import Folded
from services.cli.rebuild.pairs import BODIES, DELIVERIES, EVENTS, TASKS, Range
from services.common.database.bulk import execute_rows, placeholders
from services.common.database.times import from_micros, to_micros
from services.common.deliveries.decide import RESOLVED, settlement
from services.common.deliveries.rows import INSERT_NEW, lock_rows, store_rows
from services.common.fold import TaskRow
from services.common.taskstore import Body, insert_bodies, insert_events, upsert
from services.common.timeline import TimelineEntry

__all__ = [
    "body_rows",
    "delivery_rows",
    "missing_bodies",
    "missing_deliveries",
    "sent_by_timelines",
    "write",
    "write_lines",
    "write_rows",
]

_PART = 500
_SETTLED = ("completed", "failed", "uncertain", "cancelled")

_INSERT_TOLD = f"INSERT INTO {DELIVERIES} ({', '.join(Told._fields)}) VALUES"
# As deliveries.merge has it. Assignments see what those before them have written: the version comes last.
_MERGE_TOLD = "ON DUPLICATE KEY UPDATE " + ", ".join(
    [
        "doubts = GREATEST(doubts, VALUES(doubts))",
        "message_id = IF(VALUES(message_id) <> '' AND (VALUES(version) > version OR message_id = ''),"
        " VALUES(message_id), message_id)",
        *(
            f"{name} = IF(VALUES(version) > version, VALUES({name}), {name})"
            for name in Told._fields
            if name not in ("task_id", "version", "doubts", "message_id")
        ),
        "version = GREATEST(version, VALUES(version))",
    ]
)


def write(connection: Connection, folded: Folded) -> None:
    """Write all of a batch: the rows and their timelines, and of bodies and deliveries what is missing."""
    write_rows(connection, folded.rows)
    write_lines(connection, folded.entries.values())
    bodies = _absent(connection, "task_bodies", folded.bodies)
    insert_bodies(connection, [folded.bodies[id_] for id_ in bodies], BODIES)
    execute_rows(connection, _INSERT_TOLD, sorted(_news(connection, folded.told)), _MERGE_TOLD)


def write_rows(connection: Connection, rows: Mapping[bytes, TaskRow]) -> None:
    """Merge rows into the rebuilt `tasks`.

    Where two tasks have one idempotency key (the first one's row was lost when the second was recorded), the
    one that is read later has its row without it.
    """
    upsert(connection, rows.values(), TASKS.shadow)
    keyed = sorted(id_ for id_, row in rows.items() if row.idempotency_key is not None)
    for part in _cut(keyed):
        stored = connection.exec_driver_sql(
            f"SELECT id FROM {TASKS.shadow}"
            f" WHERE id IN ({placeholders(len(part))}) AND created_at IS NOT NULL",
            tuple(part),
        ).all()
        if len(stored) < len(part):
            there = {bytes(id_) for (id_,) in stored}
            lost = [rows[id_]._replace(idempotency_key=None) for id_ in part if id_ not in there]
            upsert(connection, lost, TASKS.shadow)


def write_lines(connection: Connection, lines: Iterable[TimelineEntry]) -> None:
    """Add lines to the rebuilt `task_events`; those that are there stay."""
    insert_events(connection, lines, EVENTS.shadow)


def missing_bodies(
    connection: Connection, range_: Range, purged_before: datetime | None, trust_tasks: bool
) -> int:
    """Return how many bodies `body_rows` would restore."""
    condition, parameters = _wanted(range_, purged_before, trust_tasks)
    return int(connection.exec_driver_sql(f"SELECT COUNT(*) {condition}", parameters).scalar_one())


def body_rows(
    connection: Connection, range_: Range, purged_before: datetime | None, trust_tasks: bool
) -> int:
    """Restore missing bodies, but for tasks that settled before that time (naive UTC); return how many.

    `trust_tasks`: a task that is settled in the original table too has lost its body to the retention.
    """
    condition, parameters = _wanted(range_, purged_before, trust_tasks)
    columns = ", ".join(Body._fields)
    chosen = ", ".join(f"{BODIES}.{column}" for column in Body._fields)
    return connection.exec_driver_sql(
        f"INSERT IGNORE INTO task_bodies ({columns}) SELECT {chosen} {condition}", parameters
    ).rowcount


def sent_by_timelines(connection: Connection, range_: Range) -> None:
    """Add the deliveries that are missing or other than sent where the timeline says that the mail was sent.

    The topics may no longer hold that event, and would have the mail sent again.
    """
    where, parameters = range_.where("task_events.task_id")
    found = connection.exec_driver_sql(
        "SELECT task_id, event_id, at, stage, task_events.attempt, detail, task_events.reply,"
        f" task_events.relay FROM task_events LEFT JOIN deliveries USING (task_id) WHERE {where}"
        " AND kind = 'sent' AND (state IS NULL OR state <> 'sent')",
        parameters,
    )
    rows = [
        Told(
            bytes(id_),
            # Only the event itself is later.
            1 << 63,
            "sent",
            int(event_id.split(":")[1]),
            attempt,
            0,
            to_micros(at),
            0,
            RESOLVED if stage == "api" else "",
            reply,
            relay,
            message_id,
        )
        for id_, event_id, at, stage, attempt, message_id, reply, relay in found
    ]
    execute_rows(connection, _INSERT_TOLD, sorted(rows), _MERGE_TOLD)


def missing_deliveries(connection: Connection, range_: Range) -> int:
    """Return how many deliveries are missing, or are said to be other than sent where the mail was sent."""
    where, parameters = range_.where(f"{DELIVERIES}.task_id")
    return int(
        connection.exec_driver_sql(
            f"SELECT COUNT(*) FROM {DELIVERIES} LEFT JOIN deliveries USING (task_id) WHERE {where} AND"
            f" (deliveries.state IS NULL OR ({DELIVERIES}.state = 'sent' AND deliveries.state <> 'sent'))",
            parameters,
        ).scalar_one()
    )


def delivery_rows(connection: Connection, range_: Range) -> int:
    """Restore missing deliveries; return how many rows were written.

    A row that is there stays, unless the mail was sent and the row does not say so (it comes from a backup):
    that was so whatever came after, as for a sender that settles late.
    """
    where, parameters = range_.where("task_id")
    query = f"SELECT {', '.join(Told._fields)}, UTC_TIMESTAMP(6) FROM {DELIVERIES} WHERE {where}"
    found = [
        restored(Told._make((bytes(id_), *columns)), now)
        for id_, *columns, now in connection.exec_driver_sql(query, parameters)
    ]
    written = execute_rows(connection, INSERT_NEW, sorted(found)) if found else 0
    sent = {row.task_id: row for row in found if row.state == "sent"}
    if written == len(found) or not sent:
        return written
    there, _ = lock_rows(connection, sent)
    stale = [row for id_, known in there.items() if (row := settlement(known, sent[id_])[1]) is not None]
    store_rows(connection, stale)
    return written + len(stale)


def _absent(connection: Connection, table: str, ids: Collection[bytes]) -> list[bytes]:
    absent: list[bytes] = []
    for part in _cut(sorted(ids)):
        query = f"SELECT task_id FROM {table} WHERE task_id IN ({placeholders(len(part))})"
        there = {bytes(id_) for (id_,) in connection.exec_driver_sql(query, tuple(part))}
        absent += [id_ for id_ in part if id_ not in there]
    return absent


def _news(connection: Connection, told: dict[bytes, Told]) -> Iterable[Told]:
    """Yield what `deliveries` does not know: most rows are there, and are never changed."""
    for part in _cut(sorted(told)):
        query = f"SELECT task_id, state FROM deliveries WHERE task_id IN ({placeholders(len(part))})"
        states = {bytes(id_): state for id_, state in connection.exec_driver_sql(query, tuple(part))}
        for id_ in part:
            if id_ not in states or (told[id_].state == "sent" and states[id_] != "sent"):
                yield told[id_]


def _cut(ids: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (ids[start : start + _PART] for start in range(0, len(ids), _PART))


def _wanted(range_: Range, purged_before: datetime | None, trust_tasks: bool) -> tuple[str, tuple[Any, ...]]:
    where, parameters = range_.where(f"{BODIES}.task_id")
    settled = placeholders(len(_SETTLED))
    purged = f"{TASKS.shadow}.updated_at < %s"
    if trust_tasks:
        purged += (
            f" OR EXISTS (SELECT 1 FROM {TASKS.name} WHERE {TASKS.name}.id = {BODIES}.task_id"
            f" AND {TASKS.name}.status IN ({settled}))"
        )
    return (
        f"FROM {BODIES} JOIN {TASKS.shadow} ON {TASKS.shadow}.id = {BODIES}.task_id"
        f" LEFT JOIN task_bodies ON task_bodies.task_id = {BODIES}.task_id WHERE {where}"
        f" AND task_bodies.task_id IS NULL AND NOT ({TASKS.shadow}.status IN ({settled}) AND ({purged}))",
        (*parameters, *_SETTLED, purged_before or from_micros(0), *(_SETTLED if trust_tasks else ())),
    )
