"""The claims on the tasks' deliveries, in SQL. All of it blocks, and bears many threads.

The rules are in decide.py; here they meet the rows. The common case of each call (nobody else knows
the task; the claim is still one's own) is one statement for all that it is given, known from the
number of affected rows alone. Only otherwise are the rows read, under their locks. Ids are sorted, so
that two senders that meet on the same rows wait for each other instead of dying of it.

Leases run by the database's clock. Where the connection died while it committed, a call is made again;
that changes nothing, since no two claims share an owner token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from operator import attrgetter

from sqlalchemy import Connection, Engine

from services.common.database.bulk import execute_rows, placeholders
from services.common.database.transactions import transaction
from services.common.deliveries.decide import (
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settlement,
    Stored,
    Taken,
    decide,
    initial_row,
    settlement,
)
from services.common.deliveries.rows import INSERT, INSERT_NEW, UNKNOWN, lock_rows, store_rows

__all__ = ["Claims"]

# Assignments see what those before them have written: the state, which the others ask for, comes last.
_SETTLE = "ON DUPLICATE KEY UPDATE " + ", ".join(
    f"{name} = IF(owner = VALUES(owner) AND state = 'sending', VALUES({name}), {name})"
    for name in (
        # A claim that is given back restores these.
        "epoch",
        "attempt",
        "takeovers",
        "doubts",
        "settled_at",
        "next_attempt_at",
        "reason",
        "reply",
        "relay",
        "state",
    )
)

# Rows a statement, so that it is of bounded length however many claims are in hand.
_RENEWALS = 5000

_by_id = attrgetter("task_id")


class Claims:
    """Claims, settles and renews. `hold`: what is found in doubt is held as uncertain, not sent again;
    otherwise it is sent again `max_resends` times an epoch at most.

    Everything raises `sqlalchemy.exc.DBAPIError`.
    """

    def __init__(self, engine: Engine, lease_seconds: float, hold: bool, max_resends: int = 1) -> None:
        self._engine = engine
        self._lease = timedelta(seconds=lease_seconds)
        self._hold, self._max_resends = hold, max_resends
        lease = f"UTC_TIMESTAMP(6) + INTERVAL {self._lease // timedelta(microseconds=1)} MICROSECOND"
        self._new_row = f"(%s, %s, %s, %s, 0, %s, {lease}, 0, 0, '', '', '', %s, 0)"
        self._renew = f"UPDATE deliveries SET lease_until = {lease}"

    def claim(self, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]:
        """Answer each request, in order. Several may be about one task. Without `take_over` nobody loses a
        claim whose lease is over."""
        since = time.monotonic()
        rows = [initial_row(request, UNKNOWN) for request in sorted(requests, key=_by_id)]
        statement = f"{INSERT_NEW} {','.join([self._new_row] * len(rows))}"
        parameters = tuple(
            value
            for row in rows
            for value in (row.task_id, row.state, row.epoch, row.attempt, row.owner, row.message_id)
        )
        # A transaction of its own: its shared locks on the rows of others must be gone before those are
        # locked exclusively, or two senders that meet here end in a deadlock.
        won = transaction(self._engine, lambda c: c.exec_driver_sql(statement, parameters).rowcount)
        if won == len(requests):
            return [self._won(request, since) for request in requests]
        return transaction(self._engine, lambda c: self._decide(c, requests, since, take_over))

    def settle(self, settled: Sequence[Delivery]) -> list[Settlement]:
        """Write the outcome of each claimed row unless its claim was lost; return what became of them."""
        return transaction(self._engine, lambda c: self._settle(c, settled))

    def renew(self, rows: Sequence[Delivery]) -> list[bool | None]:
        """Begin the lease of each claim anew; return which are still their owners', in order.

        None: the row is locked, so its lease stays as it was. It holds up no other row's renewal.
        """
        held: list[bool | None] = []
        for start in range(0, len(rows), _RENEWALS):
            part = rows[start : start + _RENEWALS]
            held += transaction(self._engine, lambda c, p=part: self._renewed(c, p))  # type: ignore[misc]
        return held

    def _won(self, request: Claim | Cancel, since: float) -> ClaimAnswer:
        row = initial_row(request, UNKNOWN)
        return Taken(row, since=since) if row.state == "sending" else Stored(row)

    def _decide(
        self, connection: Connection, requests: Sequence[Claim | Cancel], since: float, take_over: bool
    ) -> list[ClaimAnswer]:
        rows, now = lock_rows(connection, {request.task_id for request in requests})
        changed: dict[bytes, Delivery] = {}
        verdicts: list[ClaimAnswer] = []
        for request in requests:
            known = rows.get(request.task_id)
            verdict, row = decide(known, request, now, self._lease, self._hold, self._max_resends, take_over)
            verdicts.append(verdict._replace(since=since) if isinstance(verdict, Taken) else verdict)
            if row is not None:
                rows[row.task_id] = changed[row.task_id] = row
        if changed:
            store_rows(connection, changed.values())
        return verdicts

    def _settle(self, connection: Connection, settled: Sequence[Delivery]) -> list[Settlement]:
        # 2 for a row that changed, 1 for one left as it was.
        if execute_rows(connection, INSERT, sorted(settled, key=_by_id), _SETTLE) == 2 * len(settled):
            return [Settlement.STORED] * len(settled)
        rows, _ = lock_rows(connection, {row.task_id for row in settled})
        changed: dict[bytes, Delivery] = {}
        found: list[Settlement] = []
        for wish in settled:
            became, row = settlement(rows.get(wish.task_id), wish)
            found.append(became)
            if row is not None:
                rows[row.task_id] = changed[row.task_id] = row
        if changed:
            store_rows(connection, changed.values())
        return found

    def _renewed(self, connection: Connection, rows: Sequence[Delivery]) -> list[bool | None]:
        query, parameters = f"SELECT owner FROM deliveries {_held_by_owners(rows)}", _ids_and_owners(rows)
        found = connection.exec_driver_sql(f"{query} FOR UPDATE SKIP LOCKED", parameters)
        free = {bytes(owner) for (owner,) in found}
        renewed = [row for row in rows if row.owner in free]
        if renewed:
            connection.exec_driver_sql(f"{self._renew} {_held_by_owners(renewed)}", _ids_and_owners(renewed))
        if len(renewed) == len(rows):
            return [True] * len(rows)
        held = {bytes(owner) for (owner,) in connection.exec_driver_sql(query, parameters)}
        return [True if row.owner in free else None if row.owner in held else False for row in rows]


def _held_by_owners(rows: Sequence[Delivery]) -> str:
    # An owner token is one row's: two lists find the same rows as one list of pairs, and by the index.
    several = placeholders(len(rows))
    return f"WHERE task_id IN ({several}) AND owner IN ({several}) AND state = 'sending'"


def _ids_and_owners(rows: Sequence[Delivery]) -> tuple[bytes, ...]:
    return (*(row.task_id for row in rows), *(row.owner for row in rows))
