"""The claims on the tasks' deliveries, in SQL. All methods block; any thread may call them.

services/common/deliveries/decide.py has the rules; this file applies them to the rows. In the common case the
task has no delivery yet, or the claim is still held. A call then is one statement for all its requests, and
the number of affected rows shows that it was enough. Only otherwise does a call read the rows, under locks.
The ids are sorted, so that two senders with the same rows wait for each other instead of deadlocking.

Leases follow the database's clock. Where a connection is lost during the commit, the call is repeated. That
changes nothing, since every claim has an owner token of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from operator import attrgetter

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError

from services.common.database.bulk import LIMITS_KEY, execute, execute_rows, placeholders
from services.common.database.literals import literal, literal_list
from services.common.database.statement_size import StatementLimits, StatementTooLong
from services.common.database.transactions import transaction
from services.common.deliveries.decide import (
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settled,
    Taken,
    decide,
    initial_row,
)
from services.common.deliveries.rows import INSERT, INSERT_NEW, UNKNOWN, lock_rows, store_rows
from services.common.deliveries.settlement import Settlement, settlement

__all__ = ["Claims"]

# MySQL evaluates the SET list from left to right, so the state, which all conditions read, comes last.
_STORE = "ON DUPLICATE KEY UPDATE " + ", ".join(
    f"{name} = IF(owner = VALUES(owner) AND state = 'sending', VALUES({name}), {name})"
    for name in (
        # A released claim restores these.
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

# Rows a statement: its length is bounded however many claims a sender holds.
_RENEWALS = 5000
# The server compares an id with each CASE, so the time of a statement grows with the square of its rows.
_SENT = 100

_by_id = attrgetter("task_id")


class Claims:
    """Claims, renews, and stores what became of claims. All methods raise `sqlalchemy.exc.DBAPIError`.

    With `hold` a mail found in doubt becomes uncertain. Otherwise it is sent again, at most `max_resends`
    times an epoch.
    """

    def __init__(self, engine: Engine, lease_seconds: float, hold: bool, max_resends: int = 1) -> None:
        self._engine = engine
        self._lease = timedelta(seconds=lease_seconds)
        self._hold, self._max_resends = hold, max_resends
        lease = f"UTC_TIMESTAMP(6) + INTERVAL {self._lease // timedelta(microseconds=1)} MICROSECOND"
        self._new_row = f"(%s, %s, %s, %s, 0, %s, {lease}, 0, 0, '', '', '', %s, 0)"
        self._renew = f"UPDATE deliveries SET lease_until = {lease}"

    def claim(self, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]:
        """Return the answer to each request, in order. Several requests may concern one task.

        Without `take_over` a claim whose lease has ended stays its owner's.
        """
        since = time.monotonic()
        rows = [initial_row(request, UNKNOWN) for request in requests]
        new = [
            (row.task_id, row.state, row.epoch, row.attempt, row.owner, row.message_id)
            for row in sorted(rows, key=_by_id)
        ]
        # A transaction of its own: it must release its shared locks on existing rows before `_decide` locks
        # them exclusively. Otherwise two senders would deadlock here.
        won = transaction(self._engine, lambda c: execute_rows(c, INSERT_NEW, new, row=self._new_row))
        if won == len(requests):
            return [Taken(row, since=since) if row.state == "sending" else Settled(row) for row in rows]
        return transaction(self._engine, lambda c: self._decide(c, requests, since, take_over))

    def store(self, new_rows: Sequence[Delivery]) -> list[Settlement]:
        """Store each claimed row with its outcome, or released, unless its claim was lost.

        Return what became of each.
        """
        return transaction(self._engine, lambda c: self._store(c, new_rows))

    def renew(self, rows: Sequence[Delivery]) -> list[bool | None]:
        """Renew the lease of each claim; return in order whether each is still held.

        None: the row is locked, so its lease stays as it was. A locked row does not delay the others.
        """
        held: list[bool | None] = []
        for start in range(0, len(rows), _RENEWALS):
            part = rows[start : start + _RENEWALS]
            held += transaction(self._engine, lambda c, p=part: self._renewed(c, p))  # type: ignore[misc]
        return held

    def _decide(
        self, connection: Connection, requests: Sequence[Claim | Cancel], since: float, take_over: bool
    ) -> list[ClaimAnswer]:
        rows, now = lock_rows(connection, {request.task_id for request in requests})
        changed: dict[bytes, Delivery] = {}
        answers: list[ClaimAnswer] = []
        for request in requests:
            known = rows.get(request.task_id)
            answer, row = decide(known, request, now, self._lease, self._hold, self._max_resends, take_over)
            answers.append(answer._replace(since=since) if isinstance(answer, Taken) else answer)
            if row is not None:
                rows[row.task_id] = changed[row.task_id] = row
        if changed:
            store_rows(connection, changed.values())
        return answers

    def _store(self, connection: Connection, new_rows: Sequence[Delivery]) -> list[Settlement]:
        sent = sorted((row for row in new_rows if row.state == "sent"), key=_by_id)
        others = sorted((row for row in new_rows if row.state != "sent"), key=_by_id)
        # The server counts 1 for each row that an UPDATE finds. Of an INSERT it counts 2 for a row that
        # changed, and 1 for one that stayed as it was.
        if (not sent or _store_sent(connection, sent) == len(sent)) and (
            not others or execute_rows(connection, INSERT, others, _STORE) == 2 * len(others)
        ):
            return [Settlement.STORED] * len(new_rows)
        rows, _ = lock_rows(connection, {row.task_id for row in new_rows})
        changed: dict[bytes, Delivery] = {}
        found: list[Settlement] = []
        for row in new_rows:
            result, new = settlement(rows.get(row.task_id), row)
            found.append(result)
            if new is not None:
                rows[new.task_id] = changed[new.task_id] = new
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


def _store_sent(connection: Connection, rows: Sequence[Delivery]) -> int:
    """Store sent rows whose claims are still held; return how many those are.

    An UPDATE takes two thirds of the time of an INSERT ... ON DUPLICATE KEY UPDATE. A sent row has the epoch,
    the attempt and the doubts of its claim.
    """
    limits: StatementLimits | None = connection.info.get(LIMITS_KEY)
    if limits is None or limits.multi_row_bytes() is None:
        held = 0
        try:
            for start in range(0, len(rows), _SENT):
                part = rows[start : start + _SENT]
                with limits.multi_row() if limits is not None and len(part) > 1 else nullcontext():
                    held += execute(connection, _update_sent(part))
        except DataError as error:
            if not isinstance(error.orig, StatementTooLong):
                raise
        else:
            return held
    # This can be split by bytes.
    return execute_rows(connection, INSERT, rows, _STORE) // 2


def _update_sent(rows: Sequence[Delivery]) -> str:
    ids = [literal(row.task_id) for row in rows]
    columns = ("settled_at", "next_attempt_at", "reason", "reply", "relay")
    changes = (f"{name} = {_each(ids, list(map(attrgetter(name), rows)))}" for name in columns)
    return (
        f"UPDATE deliveries SET {', '.join(changes)}, state = 'sent' WHERE task_id IN ({','.join(ids)})"
        f" AND owner IN ({literal_list(row.owner for row in rows)}) AND state = 'sending'"
    )


def _each(ids: Sequence[str], values: Sequence[object]) -> str:
    """Return an expression with the value of each id."""
    if values.count(values[0]) == len(values):
        return literal(values[0])
    cases = (f"WHEN {id_} THEN {literal(value)}" for id_, value in zip(ids, values, strict=True))
    return f"CASE task_id {' '.join(cases)} END"


def _held_by_owners(rows: Sequence[Delivery]) -> str:
    # Every claim has a token of its own, so two lists find the same rows as a list of pairs, and use the
    # index.
    several = placeholders(len(rows))
    return f"WHERE task_id IN ({several}) AND owner IN ({several}) AND state = 'sending'"


def _ids_and_owners(rows: Sequence[Delivery]) -> tuple[bytes, ...]:
    return (*(row.task_id for row in rows), *(row.owner for row in rows))
