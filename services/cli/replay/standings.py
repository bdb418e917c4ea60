"""How the tasks of a batch stand, in SQL. Blocks."""

from __future__ import annotations

import json
from collections.abc import Collection

from sqlalchemy import Engine

from services.cli.replay.standing import Sending, Standing, known
from services.common.database.bulk import placeholders
from services.common.database.transactions import transaction

__all__ = ["standings"]

_LIMIT = 500
_QUERY = (
    "SELECT id, status, t.reason, t.epoch, recipient, domain, labels,"
    " d.state, d.epoch, d.attempt, d.next_attempt_at, d.reason"
    " FROM tasks t LEFT JOIN deliveries d ON d.task_id = t.id WHERE t.id IN"
)


def standings(engine: Engine, ids: Collection[bytes]) -> dict[bytes, Standing]:
    """Return how each of these tasks stands; those without a row are left out.

    Raises `sqlalchemy.exc.DBAPIError`.
    """
    found: dict[bytes, Standing] = {}
    wanted = sorted(set(ids))
    for start in range(0, len(wanted), _LIMIT):
        part = tuple(wanted[start : start + _LIMIT])
        query = f"{_QUERY} ({placeholders(len(part))})"
        rows = transaction(engine, lambda c, q=query, p=part: c.exec_driver_sql(q, p).all())  # type: ignore[misc]
        for id_, status, reason, epoch, recipient, domain, labels, *sending in rows:
            row = Standing(
                status,
                reason,
                epoch,
                recipient or "",
                domain or "",
                json.loads(labels) if labels else {},
            )
            found[bytes(id_)] = known(row, None if sending[0] is None else Sending(*sending))
    return found
