"""The failed deliveries of tasks whose domain takes no mail.

Without such a row the sender would not know the task. A group reset or a redelivery may have the validator
read `task.created` again, when the domain takes mail. The sender would then send a failed task that nobody
reopened. With the row it gets the answer of a task that ended. A later epoch may send.

The first to write decides about an epoch: once a sender has the task, the verdict changes nothing. A claim
that was released before its first attempt published anything does not count, since no event outranks the
verdict yet.
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
from services.common.statuses import NOT_COMPLETED

__all__ = ["failed_row", "merge_failure", "store_failures"]

_NEVER = datetime(1970, 1, 1)
_REASON = widths(deliveries)["reason"]

# MySQL evaluates the SET list from left to right. So the columns of the condition come last, and the new
# attempt (0) satisfies it as the old one did.
_FREE = (
    f"(epoch < VALUES(epoch) AND state IN {NOT_COMPLETED}"
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
    """Return the failed row of a task that no sender has claimed."""
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
    """Return the row after `row` (of `failed_row`) meets the known one. `store_failures` does the same in
    SQL.

    A row that is sending, sent or deferred stays, and so does one of a later epoch.
    """
    if known is None:
        return row
    over = known.epoch < row.epoch and known.state in NOT_COMPLETED
    if not over and not (known.epoch == row.epoch and _untried(known)):
        return known
    doubts = known.doubts_in_all + (known.reason == IN_DOUBT)
    return row._replace(doubts_in_all=doubts, lease_until=known.lease_until, message_id=known.message_id)


def _untried(known: Delivery) -> bool:
    return known.state == "released" and known.attempt <= 1 and not known.doubts_in_all


def store_failures(connection: Connection, events: Iterable[pb.MxFailed]) -> None:
    """Store the failed deliveries of these tasks, as `merge_failure` does. Blocks.

    Locks rows of `deliveries` in the order of their ids; the caller locks rows of `tasks` before.
    """
    last: dict[bytes, Delivery] = {}
    for row in map(failed_row, events):
        known = last.get(row.task_id)
        last[row.task_id] = row if known is None or known.epoch < row.epoch else known
    execute_rows(connection, INSERT, [last[id_] for id_ in sorted(last)], _TAIL)
