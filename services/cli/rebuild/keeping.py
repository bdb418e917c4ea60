"""What the originals know and the topics do not hold: it stays as it is.

A topic may have lost records before their time: it was created again, or records of it were deleted. A line
of a timeline that no topic holds says that one was there once. All functions work on the caller's connection
and block.
"""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection

from services.cli.rebuild.carrying import join
from services.cli.rebuild.pairs import EVENTS, TASKS, Range

__all__ = ["keep_owners_of_keys", "keep_rows", "lacking"]

_LOST = (
    f"FROM {EVENTS.found} JOIN {EVENTS.name} ON {EVENTS.joined(EVENTS.found, EVENTS.name)}"
    f" LEFT JOIN {EVENTS.shadow} ON {EVENTS.joined(EVENTS.found, EVENTS.shadow)}"
    f" WHERE {EVENTS.shadow}.{EVENTS.id} IS NULL"
)
_DIFFERING = (
    f"FROM {TASKS.found} JOIN {TASKS.name} ON {TASKS.joined(TASKS.found, TASKS.name)}"
    f" JOIN {TASKS.shadow} ON {TASKS.joined(TASKS.found, TASKS.shadow)}"
)
# The event that made a row has the row's time.
_UNEXPLAINED = (
    f"(({TASKS.shadow}.created_at IS NULL AND {TASKS.name}.created_at IS NOT NULL)"
    f" OR EXISTS (SELECT 1 {_LOST} AND {EVENTS.found}.task_id = {TASKS.found}.id)"
    f" OR ({TASKS.name}.version > {TASKS.shadow}.version AND NOT EXISTS (SELECT 1 FROM {EVENTS.shadow}"
    f" WHERE {EVENTS.shadow}.task_id = {TASKS.name}.id AND {EVENTS.shadow}.at = {TASKS.name}.updated_at)))"
)


def lacking(connection: Connection, range_: Range) -> Counter[str]:
    """Return how many of the noted lines of timelines each topic (bare name) once held, and holds no more."""
    where, parameters = range_.where(f"{EVENTS.found}.task_id")
    found = connection.exec_driver_sql(
        f"SELECT SUBSTRING_INDEX({EVENTS.found}.event_id, ':', 1), COUNT(*) {_LOST} AND {where} GROUP BY 1",
        parameters,
    )
    return Counter(dict(map(tuple, found)))


def keep_rows(connection: Connection, range_: Range) -> None:
    """Join the noted rows of tasks whose records are not all on the topics with the originals'."""
    where, parameters = range_.where(f"{TASKS.found}.id")
    found = connection.exec_driver_sql(
        f"SELECT {TASKS.found}.id {_DIFFERING} WHERE {where} AND {_UNEXPLAINED}", parameters
    )
    join(connection, [bytes(id_) for (id_,) in found])


def keep_owners_of_keys(connection: Connection, range_: Range) -> None:
    """Leave an idempotency key with the task that has it, where the rebuilt table gave it to another one.

    The task that has it in the original is the one that a repeated Create answers.
    """
    where, parameters = range_.where(f"{TASKS.found}.id")
    found = connection.exec_driver_sql(
        f"SELECT {TASKS.found}.id, {TASKS.name}.idempotency_key, other.id {_DIFFERING}"
        f" JOIN {TASKS.shadow} AS other ON other.tenant = {TASKS.name}.tenant"
        f" AND other.idempotency_key = {TASKS.name}.idempotency_key"
        f" WHERE {where} AND {TASKS.shadow}.idempotency_key IS NULL",
        parameters,
    ).all()
    for owner, key, other in found:
        for id_, value in ((other, None), (owner, key)):
            connection.exec_driver_sql(
                f"UPDATE {TASKS.shadow} SET idempotency_key = %s WHERE id = %s", (value, id_)
            )
