"""A task whose domain takes no mail has a delivery too: one that failed.

Without it the sender would know nothing of the task, and a `task.created` that is read again once the domain
takes mail (a group that is reset, a record that is redelivered) would send what had failed, though nobody
asked for it. With it the claim answers, as for every other task that ended; a later epoch is free to go.

Whoever comes first decides about the epoch. Once a sender has the task, the verdict changes nothing. A claim
that was given back before its first attempt told anything counts as none: no event outranks the verdict yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from services.common.database.bulk import execute_rows
from services.common.database.tables import deliveries, widths
from services.common.deliveries.decide import IN_DOUBT, NO_OWNER, Delivery
from services.common.deliveries.rows import INSERT

__all__ = ["failed_row", "merge_failure", "store_failures"]

_NEVER = datetime(1970, 1, 1)
_REASON = widths(deliveries)["reason"]

_OVER = ("failed", "uncertain", "cancelled")
# Assignments see what those before them have written: what the others ask for comes last, and the attempt
# that is written (0) answers as the one before did.
_FREE = (
    f"(epoch < VALUES(epoch) AND state IN {_OVER}"
    " OR epoch = VALUES(epoch) AND state = 'released' AND attempt <= 1 AND takeovers = 0)"
)
_TAIL = "ON DUPLICATE KEY UPDATE " + ", ".join(
    [
        f"takeovers = IF({_FREE} AND reason = '{IN_DOUBT}', takeovers + 1, takeovers)",
        *(
            f"{name} = IF({_FREE}, VALUES({name}), {name})"
            for name in (
                "attempt",
                "owner",
                "settled_at",
                "next_attempt_at",
                "reason",
                "reply",
                "relay",
                "doubts",
            )
        ),
        f"state = IF({_FREE}, VALUES(state), state)",
        f"epoch = IF({_FREE}, VALUES(epoch), epoch)",
    ]
)


def failed_row(event: pb.MxFailed) -> Delivery:
    """Return the row of a task that failed so and that no sender has seen."""
    return Delivery(
        event.id,
        "failed",
        event.epoch,
        0,
        0,
        NO_OWNER,
        _NEVER,
        event.at_us,
        0,
        event.reason[:_REASON],
        "",
        "",
        "",
    )


def merge_failure(known: Delivery | None, row: Delivery) -> Delivery:
    """Return the row after `row`, made by `failed_row`, meets the known one. `store_failures` does it in SQL.

    What is sending, sent or deferred is the sender's business, and a later epoch is another matter.
    """
    if known is None:
        return row
    over = known.epoch < row.epoch and known.state in _OVER
    if not over and not (known.epoch == row.epoch and _untried(known)):
        return known
    takeovers = known.takeovers + (known.reason == IN_DOUBT)
    return row._replace(takeovers=takeovers, lease_until=known.lease_until, message_id=known.message_id)


def _untried(known: Delivery) -> bool:
    return known.state == "released" and known.attempt <= 1 and not known.takeovers


def store_failures(connection: Connection, events: Iterable[pb.MxFailed]) -> None:
    """Have the deliveries of these tasks failed, but for those of a later epoch or that a sender has.

    Blocks. Locks rows of `deliveries` in the order of their ids; rows of `tasks` are to be locked before.
    """
    last: dict[bytes, Delivery] = {}
    for row in map(failed_row, events):
        known = last.get(row.task_id)
        last[row.task_id] = row if known is None or known.epoch < row.epoch else known
    execute_rows(connection, INSERT, [last[id_] for id_ in sorted(last)], _TAIL)
