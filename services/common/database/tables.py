"""The tables, as SQLAlchemy Core sees them; the migrations create them.

Times are DATETIME(6) in UTC. Ids are the 16 bytes of a UUIDv7 (RFC 9562 section 5.7). They are in time
order, so that inserts go to the end of a primary key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BINARY, JSON, VARBINARY, BigInteger, Column, Index, Integer, MetaData, String, Table
from sqlalchemy.dialects.mysql import BIGINT, DATETIME, ENUM, LONGTEXT

from services.common.statuses import STATUSES

__all__ = [
    "DELIVERY_STATES",
    "INT_MAX",
    "deliveries",
    "metadata",
    "outbox",
    "replays",
    "task_bodies",
    "task_events",
    "tasks",
    "topic_ids",
    "widths",
]

metadata = MetaData()

DELIVERY_STATES = ("sending", "released", "deferred", "failed", "sent", "uncertain", "cancelled")

INT_MAX = (1 << 31) - 1


def widths(table: Table) -> Mapping[str, int]:
    """Return the length of each of the table's texts (characters) and byte strings (bytes)."""
    lengths = ((column.name, getattr(column.type, "length", None)) for column in table.columns)
    return {name: length for name, length in lengths if length is not None}


_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}


def _time(name: str, nullable: bool = True) -> Column[Any]:
    return Column(name, DATETIME(fsp=6), nullable=nullable)


# One row for each task, in the order of TaskRow (services/common/fold.py). The columns of the task.created
# event are NULL while only later events were read (a rebuild reads the topics in any order).
tasks = Table(
    "tasks",
    metadata,
    Column("id", BINARY(16), primary_key=True),
    Column("tenant", String(64)),
    # Bytes: a text column would treat "key" and "key " as equal (PAD SPACE).
    Column("idempotency_key", VARBINARY(255)),
    Column("request_hash", BINARY(32)),
    Column("recipient", String(320)),
    Column("domain", String(255)),
    Column("subject", String(998)),
    Column("labels", JSON),
    _time("created_at"),
    Column("status", ENUM(*STATUSES), nullable=False),
    Column("version", BIGINT(unsigned=True), nullable=False),
    Column("epoch", BIGINT(unsigned=True), nullable=False),
    Column("attempts", Integer, nullable=False),
    _time("next_attempt_at"),
    Column("reason", String(64), nullable=False),
    Column("reply", String(1024), nullable=False),
    Column("message_id", String(255), nullable=False),
    _time("updated_at", nullable=False),
    Index("tasks_by_key", "tenant", "idempotency_key", unique=True),
    Index("tasks_by_status", "tenant", "status", "id"),
    Index("tasks_by_recipient", "tenant", "recipient", "id"),
    Index("tasks_by_domain", "tenant", "domain", "id"),
    **_OPTIONS,
)

task_bodies = Table(
    "task_bodies",
    metadata,
    Column("task_id", BINARY(16), primary_key=True),
    Column("body", LONGTEXT),
    Column("html", LONGTEXT),
    Column("headers", JSON),
    **_OPTIONS,
)

task_events = Table(
    "task_events",
    metadata,
    Column("task_id", BINARY(16), primary_key=True),
    Column("event_id", String(96), primary_key=True),
    _time("at", nullable=False),
    Column("stage", String(16), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("relay", String(255), nullable=False),
    Column("reply", String(1024), nullable=False),
    Column("detail", String(1024), nullable=False),
    _time("next_attempt_at"),
    **_OPTIONS,
)

# The events that are not published yet, without a payload: the sweeper rebuilds an event from tasks and
# task_bodies. A sweeper may take a row from `available_at` on, and then moves that time ahead; `due_at`
# stays.
outbox = Table(
    "outbox",
    metadata,
    Column("task_id", BINARY(16), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("epoch", BIGINT(unsigned=True), primary_key=True),
    _time("available_at", nullable=False),
    # A version before this column leaves it out.
    _time("due_at"),
    Index("outbox_by_time", "available_at", "due_at"),
    **_OPTIONS,
)

# The claim on each task's delivery, and its outcome, which is published again if a sender died after
# storing it.
deliveries = Table(
    "deliveries",
    metadata,
    Column("task_id", BINARY(16), primary_key=True),
    Column("state", ENUM(*DELIVERY_STATES), nullable=False),
    Column("epoch", BIGINT(unsigned=True), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("takeovers", Integer, nullable=False),
    Column("owner", BINARY(16), nullable=False),
    _time("lease_until", nullable=False),
    Column("settled_at", BigInteger, nullable=False),
    Column("next_attempt_at", BigInteger, nullable=False),
    Column("reason", String(64), nullable=False),
    Column("reply", String(1024), nullable=False),
    Column("relay", String(255), nullable=False),
    Column("message_id", String(255), nullable=False),
    # A version before this column leaves it out.
    Column("doubts", Integer, nullable=False, server_default="0"),
    **_OPTIONS,
)

# How far each `postroad replay` is.
replays = Table(
    "replays",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("topic", String(249), nullable=False),
    Column("arguments", JSON, nullable=False),
    Column("epoch", BIGINT(unsigned=True), nullable=False),
    Column("positions", JSON, nullable=False),
    Column("counts", JSON, nullable=False),
    _time("started_at", nullable=False),
    _time("updated_at", nullable=False),
    _time("finished_at"),
    **_OPTIONS,
)

# The ids of each topic, and when each was first seen. A topic that is created again has another id.
topic_ids = Table(
    "topic_ids",
    metadata,
    Column("topic", String(249), primary_key=True),
    Column("id", BINARY(16), primary_key=True),
    _time("seen_at", nullable=False),
    **_OPTIONS,
)
