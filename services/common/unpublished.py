"""What stands in the outbox though its time has come. SQL only; blocks."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection

__all__ = ["LEASE", "Unpublished", "unpublished"]

LEASE = 45
"""Seconds that a sweeper has for what it took; longer than its producer tries (`delivery.timeout.ms`)."""

# A row that is due is tried again within LEASE, so the index on available_at leads to all of them. A version
# before the column due_at leaves it out.
_DUE = (
    "SELECT COUNT(*), TIMESTAMPDIFF(MICROSECOND, MIN(COALESCE(due_at, available_at)), UTC_TIMESTAMP(6))"
    f" FROM outbox WHERE available_at <= UTC_TIMESTAMP(6) + INTERVAL {LEASE} SECOND"
    " AND COALESCE(due_at, available_at) <= UTC_TIMESTAMP(6)"
)


class Unpublished(NamedTuple):
    """How many events should be published and are not, and since when (seconds) the first is due; 0: none."""

    due: int
    oldest_seconds: float


def unpublished(connection: Connection) -> Unpublished:
    """Return what is due by the database's clock. An event that is just being published counts too."""
    due, us = connection.exec_driver_sql(_DUE).one()
    return Unpublished(int(due), max(0, us or 0) / 1e6)
