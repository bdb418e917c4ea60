"""What a replay does with a record, decided from how its task stands. Pure.

Records that make a stage work (`task.created`, `mx.ok`):

| the task is                       | what becomes of the record                                           |
| --------------------------------- | -------------------------------------------------------------------- |
| completed                         | ALREADY_SENT, left out                                               |
| failed, cancelled or uncertain    | SETTLED, left out, unless `--reopen` names that status: REOPENED     |
| ... in this replay's epoch or later | REOPENED_SINCE, left out: by this replay or by somebody else       |
| deferred by the sender            | WAITS, left out, until its next attempt is overdue (or `--reopen     |
|                                   | deferred`): then `mx.ok` goes as that attempt, NEXT_ATTEMPT          |
| scheduled for later (`send_at`)    | WAITS, left out: it would go before its time                         |
| pending or processing             | AGAIN, in the epoch that the task has now; where the sender is at a  |
|                                   | later attempt than the first, `mx.ok` goes as that attempt           |

Only REOPENED has a fresh epoch. A task that works keeps its own, so that whatever is decided about it between
this look and the sender's claim (it is cancelled, it is held as uncertain) is of the same epoch, and the
claim answers with it. A fresh one would be taken for a wish to send it all the same. An earlier attempt than
the claim's would be taken for a record that was overtaken, and nothing would become of it.

The records of the other topics are folded, nothing more: all AGAIN, as they are. Records of the delay topics
go AGAIN as they are where their task still works, in their epoch, and they are due.
"""

from __future__ import annotations

from collections.abc import Set
from enum import StrEnum
from typing import NamedTuple

from services.cli.replay.standing import ENDED, Standing

__all__ = ["REOPENABLE", "Decision", "What", "delayed", "in_time", "working"]

REOPENABLE = ("failed", "cancelled", "uncertain", "deferred")
# An attempt that is due waits its turn in the stage; later than this it has probably been lost.
OVERDUE_US = 60_000_000


class What(StrEnum):
    """What becomes of a record. REFUSED is never decided: Kafka refused the record for good."""

    AGAIN = "again"
    NEXT_ATTEMPT = "next attempt"
    REOPENED = "reopened"
    ALREADY_SENT = "already sent"
    SETTLED = "settled"
    REOPENED_SINCE = "reopened since"
    WAITS = "waits"
    UNDECODABLE = "undecodable"
    NOT_SELECTED = "not selected"
    REFUSED = "refused"

    @classmethod
    def _missing_(cls, value: object) -> What | None:
        # As a replay that an earlier version began has stored it.
        return cls.NOT_SELECTED if value == "not meant" else None

    @property
    def produced(self) -> bool:
        """Whether the record is produced again."""
        return self in (What.AGAIN, What.NEXT_ATTEMPT, What.REOPENED)


class Decision(NamedTuple):
    """What becomes of a record, the epoch that it goes in, and the attempt that it goes as.

    `attempt` 0: as what it is on its topic; otherwise it goes to a delay topic, where attempts stand.
    """

    what: What
    epoch: int
    attempt: int = 0


def working(
    epoch: int, task: Standing, *, reopen: Set[str], fresh: int, now_us: int, sends: bool
) -> Decision:
    """Decide about a record of `task.created` or (`sends`) `mx.ok` that is of `epoch`.

    `reopen`: some of REOPENABLE; `fresh`: the replay's epoch; `now_us`: microseconds since the Unix epoch.
    """
    if task.status == "completed":
        return Decision(What.ALREADY_SENT, epoch)
    if epoch > task.epoch:
        # It was reopened, and the fold does not know of it yet.
        return Decision(What.AGAIN, epoch)
    if task.status in ENDED:
        if task.status not in reopen:
            return Decision(What.SETTLED, epoch)
        if task.epoch >= fresh:
            return Decision(What.REOPENED_SINCE, epoch)
        return Decision(What.REOPENED, fresh)
    if task.waits is not None:
        attempt, due_us = task.waits
        if sends and (due_us + OVERDUE_US < now_us or "deferred" in reopen):
            return Decision(What.NEXT_ATTEMPT, task.epoch, attempt + 1)
        return Decision(What.WAITS, epoch)
    return Decision(What.AGAIN, task.epoch, task.attempt if sends and task.attempt > 1 else 0)


def in_time(decision: Decision, epoch: int, send_at_us: int, now_us: int) -> Decision:
    """Return the decision about a record of `epoch`; WAITS where it would send before its `send_at`.

    A scheduled task is on the topics before its time only if it was cancelled. Retry keeps that time.
    """
    return Decision(What.WAITS, epoch) if decision.what.produced and send_at_us > now_us else decision


def delayed(epoch: int, task: Standing, *, due_ms: int, now_ms: int) -> Decision:
    """Decide about a record of a delay topic that is of `epoch` and due at `due_ms` (Unix milliseconds)."""
    if task.status == "completed":
        return Decision(What.ALREADY_SENT, epoch)
    if epoch < task.epoch:
        return Decision(What.REOPENED_SINCE, epoch)
    if task.status in ENDED and epoch == task.epoch:
        return Decision(What.SETTLED, epoch)
    return Decision(What.WAITS if due_ms > now_ms else What.AGAIN, epoch)
