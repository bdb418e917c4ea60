"""Writes folded batches into the shadow tables, and restores missing bodies and deliveries.

All functions use the caller's connection and its transaction, and block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from services.common.database.bulk import execute_rows, placeholders
from services.common.database.times import from_micros, to_micros
from services.common.deliveries.decide import RESOLVED
from services.common.deliveries.rows import INSERT_NEW, lock_rows, store_rows
from services.common.deliveries.settlement import settlement
from services.common.fold import TaskRow
from services.common.operations.rebuild.folded_batch import DeliveryFacts, FoldedBatch, restored_delivery
from services.common.operations.rebuild.shadow_table import BODIES, DELIVERIES, EVENTS, TASKS, TaskRange
from services.common.statuses import FINAL_STATUSES
from services.common.taskstore import Body, insert_bodies, insert_events, upsert
from services.common.timeline import TimelineRow

__all__ = [
    "add_sent_by_timelines",
    "count_missing_bodies",
    "count_missing_deliveries",
    "restore_bodies",
    "restore_deliveries",
    "write",
    "write_entries",
    "write_rows",
]

_PART = 500

_INSERT_FACTS = f"INSERT INTO {DELIVERIES} ({', '.join(DeliveryFacts._fields)}) VALUES"
# The same merge as `merge_facts`. MySQL evaluates the SET list from left to right, so the version comes last.
_MERGE_FACTS = "ON DUPLICATE KEY UPDATE " + ", ".join(
    [
        "doubts = GREATEST(doubts, VALUES(doubts))",
        "message_id = IF(VALUES(message_id) <> '' AND (VALUES(version) > version OR message_id = ''),"
        " VALUES(message_id), message_id)",
        *(
            f"{name} = IF(VALUES(version) > version, VALUES({name}), {name})"
            for name in DeliveryFacts._fields
            if name not in ("task_id", "version", "doubts", "message_id")
        ),
        "version = GREATEST(version, VALUES(version))",
    ]
)


def write(connection: Connection, folded: FoldedBatch) -> None:
    """Write a batch's rows and timeline entries, and the bodies and delivery facts that are missing."""
    write_rows(connection, folded.rows)
    write_entries(connection, folded.entries.values())
    bodies = _absent(connection, "task_bodies", folded.bodies)
    insert_bodies(connection, [folded.bodies[id_] for id_ in bodies], BODIES)
    execute_rows(connection, _INSERT_FACTS, sorted(_missing_facts(connection, folded.facts)), _MERGE_FACTS)


def write_rows(connection: Connection, rows: Mapping[bytes, TaskRow]) -> None:
    """Merge rows into the shadow table of `tasks`.

    Two tasks may have one idempotency key: the first one's row was lost before the second one was recorded.
    The task that is read later then gets its row without the key.
    """
    upsert(connection, rows.values(), TASKS.name)
    keyed = sorted(id_ for id_, row in rows.items() if row.idempotency_key is not None)
    for part in _cut(keyed):
        stored = connection.exec_driver_sql(
            f"SELECT id FROM {TASKS.name} WHERE id IN ({placeholders(len(part))}) AND created_at IS NOT NULL",
            tuple(part),
        ).all()
        if len(stored) < len(part):
            present = {bytes(id_) for (id_,) in stored}
            lost = [rows[id_]._replace(idempotency_key=None) for id_ in part if id_ not in present]
            upsert(connection, lost, TASKS.name)


def write_entries(connection: Connection, entries: Iterable[TimelineRow]) -> None:
    """Add entries to the shadow table of `task_events`. Entries that it has stay as they are."""
    insert_events(connection, entries, EVENTS.name)


def count_missing_bodies(
    connection: Connection, range_: TaskRange, purged_before: datetime | None, trust_tasks: bool
) -> int:
    """Return how many bodies `restore_bodies` would restore."""
    condition, parameters = _missing_bodies(range_, purged_before, trust_tasks)
    return int(connection.exec_driver_sql(f"SELECT COUNT(*) {condition}", parameters).scalar_one())


def restore_bodies(
    connection: Connection, range_: TaskRange, purged_before: datetime | None, trust_tasks: bool
) -> int:
    """Restore missing bodies. Returns how many.

    A task that ended before `purged_before` (naive UTC) stays without its body. With `trust_tasks`, so does
    a task that is final in the original table: its retention has deleted the body.
    """
    condition, parameters = _missing_bodies(range_, purged_before, trust_tasks)
    columns = ", ".join(Body._fields)
    chosen = ", ".join(f"{BODIES}.{column}" for column in Body._fields)
    return connection.exec_driver_sql(
        f"INSERT IGNORE INTO task_bodies ({columns}) SELECT {chosen} {condition}", parameters
    ).rowcount


def add_sent_by_timelines(connection: Connection, range_: TaskRange) -> None:
    """Add delivery facts where a timeline says that the mail was sent and `deliveries` does not.

    The topics may no longer hold that event. Without it the mail would be sent again.
    """
    where, parameters = range_.where("task_events.task_id")
    found = connection.exec_driver_sql(
        "SELECT task_id, event_id, at, stage, task_events.attempt, detail, task_events.reply,"
        f" task_events.relay FROM task_events LEFT JOIN deliveries USING (task_id) WHERE {where}"
        " AND kind = 'sent' AND (state IS NULL OR state <> 'sent')",
        parameters,
    )
    rows = [
        DeliveryFacts(
            bytes(id_),
            # Only the event itself has a later version.
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
    execute_rows(connection, _INSERT_FACTS, sorted(rows), _MERGE_FACTS)


def count_missing_deliveries(connection: Connection, range_: TaskRange) -> int:
    """Return how many deliveries are missing, or are not marked as sent although the mail was sent."""
    where, parameters = range_.where(f"{DELIVERIES}.task_id")
    return int(
        connection.exec_driver_sql(
            f"SELECT COUNT(*) FROM {DELIVERIES} LEFT JOIN deliveries USING (task_id) WHERE {where} AND"
            f" (deliveries.state IS NULL OR ({DELIVERIES}.state = 'sent' AND deliveries.state <> 'sent'))",
            parameters,
        ).scalar_one()
    )


def restore_deliveries(connection: Connection, range_: TaskRange) -> int:
    """Restore missing deliveries. Returns how many rows were written.

    A row stays as it is, unless the mail was sent and the row, from a backup, does not say so. As for a
    sender that settles late, the mail counts as sent whatever came after.
    """
    where, parameters = range_.where("task_id")
    query = f"SELECT {', '.join(DeliveryFacts._fields)}, UTC_TIMESTAMP(6) FROM {DELIVERIES} WHERE {where}"
    found = [
        restored_delivery(DeliveryFacts._make((bytes(id_), *columns)), now)
        for id_, *columns, now in connection.exec_driver_sql(query, parameters)
    ]
    written = execute_rows(connection, INSERT_NEW, sorted(found)) if found else 0
    sent = {row.task_id: row for row in found if row.state == "sent"}
    if written == len(found) or not sent:
        return written
    present, _ = lock_rows(connection, sent)
    stale = [row for id_, known in present.items() if (row := settlement(known, sent[id_])[1]) is not None]
    store_rows(connection, stale)
    return written + len(stale)


def _absent(connection: Connection, table: str, ids: Collection[bytes]) -> list[bytes]:
    absent: list[bytes] = []
    for part in _cut(sorted(ids)):
        query = f"SELECT task_id FROM {table} WHERE task_id IN ({placeholders(len(part))})"
        present = {bytes(id_) for (id_,) in connection.exec_driver_sql(query, tuple(part))}
        absent += [id_ for id_ in part if id_ not in present]
    return absent


def _missing_facts(connection: Connection, facts: Mapping[bytes, DeliveryFacts]) -> Iterable[DeliveryFacts]:
    """Yield the facts that `deliveries` lacks. It has most rows, and they are never changed."""
    for part in _cut(sorted(facts)):
        query = f"SELECT task_id, state FROM deliveries WHERE task_id IN ({placeholders(len(part))})"
        states = {bytes(id_): state for id_, state in connection.exec_driver_sql(query, tuple(part))}
        for id_ in part:
            if id_ not in states or (facts[id_].state == "sent" and states[id_] != "sent"):
                yield facts[id_]


def _cut(ids: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (ids[start : start + _PART] for start in range(0, len(ids), _PART))


def _missing_bodies(
    range_: TaskRange, purged_before: datetime | None, trust_tasks: bool
) -> tuple[str, tuple[Any, ...]]:
    where, parameters = range_.where(f"{BODIES}.task_id")
    final = placeholders(len(FINAL_STATUSES))
    purged = f"{TASKS.name}.updated_at < %s"
    if trust_tasks:
        purged += (
            f" OR EXISTS (SELECT 1 FROM {TASKS.original} WHERE {TASKS.original}.id = {BODIES}.task_id"
            f" AND {TASKS.original}.status IN ({final}))"
        )
    return (
        f"FROM {BODIES} JOIN {TASKS.name} ON {TASKS.name}.id = {BODIES}.task_id"
        f" LEFT JOIN task_bodies ON task_bodies.task_id = {BODIES}.task_id WHERE {where}"
        f" AND task_bodies.task_id IS NULL AND NOT ({TASKS.name}.status IN ({final}) AND ({purged}))",
        (
            *parameters,
            *FINAL_STATUSES,
            purged_before or from_micros(0),
            *(FINAL_STATUSES if trust_tasks else ()),
        ),
    )
