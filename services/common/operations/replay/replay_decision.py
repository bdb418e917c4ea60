"""What a replay does with a record, decided by its task's state. Pure.

Records that make a stage work (`task.created`, `mx.ok`):

| the task is                    | the replay's action                                                       |
| ------------------------------ | ------------------------------------------------------------------------- |
| completed                      | ALREADY_SENT: leaves the record out                                       |
| failed, cancelled or uncertain | SETTLED: leaves it out; with `--reopen` of that status: REOPENED          |
| ... in this replay's epoch     | REOPENED_SINCE: leaves it out, since this replay or somebody reopened it  |
| or later                       |                                                                           |
| deferred by the sender         | WAITS: leaves it out; once the next attempt is overdue, or with           |
|                                | `--reopen deferred`, produces `mx.ok` as that attempt: NEXT_ATTEMPT       |
| scheduled for later (`send_at`) | WAITS: leaves it out, since it would be sent too early                   |
| pending or processing          | REPUBLISH, in the task's present epoch; `mx.ok` as the attempt that the   |
|                                | sender is at, where that is later than the first                          |

Only REOPENED uses a new epoch. Other tasks keep their own. A task may be cancelled or held as uncertain
between this decision and the sender's claim. Then both are of one epoch, and the claim answers with what was
decided. With a new epoch, the claim would send the mail anyway. With an earlier attempt, it would answer
Stale, and nothing would happen.

Records of the other topics send no mail: all are REPUBLISHed unchanged. The fold and Watch read them, and the
sender reads `task.cancelled`, whose claim answers what is already so. Records of delay topics are
REPUBLISHed unchanged once they are due, while their task still works in their epoch.
"""

from __future__ import annotations

from collections.abc import Set
from enum import StrEnum
from typing import NamedTuple

from services.common.operations.replay.task_state import TaskState
from services.common.statuses import NOT_COMPLETED

__all__ = [
    "REOPENABLE",
    "ReplayAction",
    "ReplayDecision",
    "decide_delayed",
    "decide_work",
    "wait_for_send_at",
]

REOPENABLE = ("failed", "cancelled", "uncertain", "deferred")
"""The statuses that `--reopen` takes. `deferred`: the sender deferred the task."""
# An attempt that is due waits for its turn in the stage. If it is later than this, it is probably lost.
OVERDUE_US = 60_000_000


class ReplayAction(StrEnum):
    """What a replay does with a record. REFUSED is never decided: Kafka refused the record for good."""

    REPUBLISH = "again"
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
    def _missing_(cls, value: object) -> ReplayAction | None:
        # An earlier version stored this name with its replays.
        return cls.NOT_SELECTED if value == "not meant" else None

    @property
    def produces(self) -> bool:
        """Whether the replay produces the record again."""
        return self in (ReplayAction.REPUBLISH, ReplayAction.NEXT_ATTEMPT, ReplayAction.REOPENED)


class ReplayDecision(NamedTuple):
    """The action, and the epoch and the attempt that the record is produced with.

    With `attempt` 0 the record goes to its own topic. Otherwise it goes to a delay topic, whose records name
    their attempts.
    """

    action: ReplayAction
    epoch: int
    attempt: int = 0


def decide_work(
    epoch: int, task: TaskState, *, reopen: Set[str], new_epoch: int, now_us: int, to_sender: bool
) -> ReplayDecision:
    """Decide about a record of `task.created`, or of `mx.ok` with `to_sender`. `epoch` is the record's.

    `reopen` holds some of REOPENABLE. `new_epoch` is the epoch of the tasks that the replay reopens. `now_us`
    is the time in microseconds since the Unix epoch.
    """
    if task.status == "completed":
        return ReplayDecision(ReplayAction.ALREADY_SENT, epoch)
    if epoch > task.epoch:
        # Somebody reopened the task, and the fold has not seen it yet.
        return ReplayDecision(ReplayAction.REPUBLISH, epoch)
    if task.status in NOT_COMPLETED:
        if task.status not in reopen:
            return ReplayDecision(ReplayAction.SETTLED, epoch)
        if task.epoch >= new_epoch:
            return ReplayDecision(ReplayAction.REOPENED_SINCE, epoch)
        return ReplayDecision(ReplayAction.REOPENED, new_epoch)
    if task.deferred is not None:
        attempt, due_us = task.deferred
        if to_sender and (due_us + OVERDUE_US < now_us or "deferred" in reopen):
            return ReplayDecision(ReplayAction.NEXT_ATTEMPT, task.epoch, attempt + 1)
        return ReplayDecision(ReplayAction.WAITS, epoch)
    attempt = task.attempt if to_sender and task.attempt > 1 else 0
    return ReplayDecision(ReplayAction.REPUBLISH, task.epoch, attempt)


def wait_for_send_at(decision: ReplayDecision, epoch: int, send_at_us: int, now_us: int) -> ReplayDecision:
    """Return the decision about a record of `epoch`, or WAITS where it would be sent before its `send_at`.

    A scheduled task has records before its time only if it was cancelled. A retry keeps its time.
    """
    if decision.action.produces and send_at_us > now_us:
        return ReplayDecision(ReplayAction.WAITS, epoch)
    return decision


def decide_delayed(epoch: int, task: TaskState, *, due_ms: int, now_ms: int) -> ReplayDecision:
    """Decide about a record of a delay topic. It is of `epoch` and due at `due_ms` (Unix milliseconds)."""
    if task.status == "completed":
        return ReplayDecision(ReplayAction.ALREADY_SENT, epoch)
    if epoch < task.epoch:
        return ReplayDecision(ReplayAction.REOPENED_SINCE, epoch)
    if task.status in NOT_COMPLETED and epoch == task.epoch:
        return ReplayDecision(ReplayAction.SETTLED, epoch)
    return ReplayDecision(ReplayAction.WAITS if due_ms > now_ms else ReplayAction.REPUBLISH, epoch)
