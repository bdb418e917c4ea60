"""Counts the events of the outbox that are due and not published, for the api and `postroad lag`. Blocks."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, func, select, text

from services.common.database.tables import outbox

__all__ = ["SWEEP_SECONDS", "Unpublished", "unpublished"]

SWEEP_SECONDS = 45
"""Seconds for which the api's sweeper leases rows, longer than its producer tries (`delivery.timeout.ms`).

It is here, not in the api, because the query below relies on it."""

_NOW = func.utc_timestamp(6)
# A version before the column `due_at` leaves it out.
_DUE_AT = func.coalesce(outbox.c.due_at, outbox.c.available_at)
_DUE = select(func.count(), func.timestampdiff(text("MICROSECOND"), func.min(_DUE_AT), _NOW)).where(
    # A sweeper retries a due row within SWEEP_SECONDS, so the index on available_at leads to all due rows.
    outbox.c.available_at <= func.timestampadd(text("SECOND"), SWEEP_SECONDS, _NOW),
    _DUE_AT <= _NOW,
)


class Unpublished(NamedTuple):
    """The number of due events, and the time (seconds) since the first became due; 0: there is none."""

    due: int
    oldest_seconds: float


def unpublished(connection: Connection) -> Unpublished:
    """Return what is due by the database's clock, also events that are just being published."""
    due, us = connection.execute(_DUE).one()
    return Unpublished(int(due), max(0, us or 0) / 1e6)
