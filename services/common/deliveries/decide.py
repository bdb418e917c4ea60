"""What a claim or a cancellation does to a task's delivery, decided from its row in `deliveries`. Pure.

A claim is compared with a row by (epoch, attempt). The answers to a Claim:

| row's state            | claim is older | same            | later attempt   | later epoch     |
| ---------------------- | -------------- | --------------- | --------------- | --------------- |
| none                   | Taken          | Taken           | Taken           | Taken           |
| `sent`                 | Settled        | Settled         | Settled         | Settled         |
| `sending`, lease runs  | Stale          | Wait            | Wait            | Wait            |
| `sending`, lease over  | Stale          | in doubt        | in doubt        | in doubt        |
| `released`             | Stale          | Taken           | Taken           | Taken           |
| `released`, doubtful   | Stale          | in doubt        | in doubt        | in doubt        |
| `deferred`             | Stale          | Settled         | Taken           | Taken           |
| `failed`               | Stale          | Settled         | Settled         | Taken           |
| `uncertain`            | Stale          | Settled         | Settled         | Taken           |
| `cancelled`            | Stale          | Settled         | Settled         | Taken           |

In doubt: the last owner is gone and may have handed the mail over. While the epoch has a resend left, the
claim takes the row (`Taken` with `doubtful`). Otherwise the row becomes `uncertain`, and the answer is
Settled. The policy `hold` allows no resends.

Doubtful: the row's reason is `in_doubt`. A claim counts the doubt that it finds, and its row keeps that
reason until the doubt is published. If the claim is released before, the next claim finds the same doubt
and does not count it again.

Settled: the handler publishes the row's outcome once more, since its sender may have died before it did. A
row that is `cancelled`, or that the validator failed, has no event of the sender's: the api or the validator
publishes it.
Stale: a later record has overtaken this one and will publish the outcome, so there is nothing to do. `sent`
is the answer to every claim, since it is true in every epoch.

The answers to a Cancel of epoch e, which compares only epochs:

| row's state                             | row's epoch > e | = e             | < e                |
| --------------------------------------- | --------------- | --------------- | ------------------ |
| none                                    | -               | now cancelled   | now cancelled      |
| `sent`                                  | Settled         | Settled         | Settled            |
| `sending`, lease runs                   | Stale           | Wait            | Wait               |
| `sending`, lease over                   | Stale           | now uncertain   | now uncertain      |
| `released`, `deferred`                  | Stale           | now cancelled*  | now cancelled*     |
| `failed`, `uncertain`, `cancelled`      | Stale           | Settled         | now cancelled*     |

A Cancel waits for a running claim, since that may end as `deferred`, and then the next attempt must not send.

(*) If the mail was ever in doubt, in any attempt or epoch, the row becomes `uncertain` under either policy.
The mail must not be sent again, and nobody can promise that it was never sent.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from services.common.database.times import to_micros
from services.common.statuses import NOT_COMPLETED

__all__ = [
    "IN_DOUBT",
    "NOT_SENT",
    "NO_OWNER",
    "RESOLVED",
    "Cancel",
    "Claim",
    "ClaimAnswer",
    "Delivery",
    "DeliveryState",
    "Settled",
    "Stale",
    "Taken",
    "Wait",
    "decide",
    "initial_row",
    "may_resend",
    "released_row",
]

DeliveryState = Literal["sending", "released", "deferred", "failed", "sent", "uncertain", "cancelled"]

# The reason of every outcome that leaves it open whether the mail was delivered.
IN_DOUBT = "in_doubt"
# The reasons after an operator's decision: the mail was not sent; it was sent.
NOT_SENT = "not_sent"
RESOLVED = "resolved"
NO_OWNER = bytes(16)
"""The owner token of a row that no claim has written."""


class Delivery(NamedTuple):
    """A row of `deliveries`, in the order of its columns, which rows.py names.

    Every claim has an `owner` token of its own.
    """

    task_id: bytes
    state: DeliveryState
    epoch: int
    attempt: int
    # How often a claim found the mail in doubt, or an operator closed it so, in all epochs. The column is
    # `takeovers`.
    doubts_in_all: int
    owner: bytes
    # By the database's clock, UTC.
    lease_until: datetime
    # Microseconds since the Unix epoch; 0 where there is none.
    settled_at: int
    next_attempt_at: int
    reason: str
    reply: str
    relay: str
    message_id: str
    # How often the epoch's mail was in doubt before this claim: it was resent as often. The column is
    # `doubts`.
    doubts_in_epoch: int = 0


class Claim(NamedTuple):
    """A request to send. An earlier attempt's Message-ID takes precedence over `message_id`."""

    task_id: bytes
    epoch: int
    attempt: int
    owner: bytes
    message_id: str


class Cancel(NamedTuple):
    """A request to send the task no more, in this epoch and earlier ones."""

    task_id: bytes
    epoch: int
    owner: bytes


class Taken(NamedTuple):
    """The caller owns the row. It may send once it has published that the mail may go out twice, if so.

    `doubtful`: the last owner may have handed the mail over, or released the row before that doubt was
    published. `earlier`: the row of an earlier attempt that ended in doubt, whose event its sender may not
    have published. `since`: the claimer's monotonic clock before its call.
    """

    row: Delivery
    doubtful: bool = False
    earlier: Delivery | None = None
    since: float = 0.0


class Wait(NamedTuple):
    """Another claim's lease runs for so many more seconds, unless renewed. 0: it is over, without a
    takeover yet."""

    seconds: float


class Settled(NamedTuple):
    """The row is settled: publish its outcome, if the sender has an event for it."""

    row: Delivery


class Stale(NamedTuple):
    """A later record of the task has overtaken this one."""


ClaimAnswer = Taken | Wait | Settled | Stale


def initial_row(request: Claim | Cancel, lease_until: datetime) -> Delivery:
    """Return the row that a request creates if the task has none."""
    state: DeliveryState = "sending"
    attempt, message_id = 0, ""
    if isinstance(request, Claim):
        attempt, message_id = request.attempt, request.message_id
    else:
        state = "cancelled"
    return Delivery(
        request.task_id,
        state,
        request.epoch,
        attempt,
        0,
        request.owner,
        lease_until,
        0,
        0,
        "",
        "",
        "",
        message_id,
    )


def may_resend(doubts: int, hold: bool, max_resends: int) -> bool:
    """Return whether a mail is sent again after so many doubts in its epoch, the present one included."""
    return not hold and doubts <= max_resends


def decide(  # noqa: PLR0917
    row: Delivery | None,
    request: Claim | Cancel,
    now: datetime,
    lease: timedelta,
    hold: bool,
    max_resends: int = 1,
    take_over: bool = True,
) -> tuple[ClaimAnswer, Delivery | None]:
    """Return the answer to `request` and the row to write; None: the row stays as it is.

    `now` is the database's time, no later than the row was read. With `hold` a mail in doubt is not sent
    again; otherwise it is resent at most `max_resends` times an epoch. Without `take_over` a lease that has
    ended counts as running.

    An owner that repeats its request (the first answer was lost) gets the same answer. Only an `earlier`
    row is replaced by then, and the answer is `doubtful` instead.
    """
    if isinstance(request, Cancel):
        return _cancel(row, request, now, take_over)
    until = now + lease
    if row is None:
        new = initial_row(request, until)
        return Taken(new), new
    if row.state == "sent":
        return Settled(row), None
    if row.state == "sending" and row.owner == request.owner:
        new = row._replace(lease_until=until)
        return Taken(new, doubtful=row.reason == IN_DOUBT), new
    if (request.epoch, request.attempt) < (row.epoch, row.attempt):
        return Stale(), None
    if row.state == "sending" and (row.lease_until > now or not take_over):
        return _wait(row, now), None
    if row.state == "sending" or _has_unpublished_doubt(row):
        new = _taken(row, request, until)
        if not may_resend(new.doubts_in_epoch, hold, max_resends):
            new = _uncertain(row, request.epoch, request.attempt, request.owner, now)
            return Settled(new), new
        return Taken(new, doubtful=True), new
    free = (
        row.state == "released"
        or request.epoch > row.epoch
        or (row.state == "deferred" and request.attempt > row.attempt)
    )
    if not free:
        return Settled(row), None
    new = _taken(row, request, until)
    return Taken(new, earlier=row if row.reason == IN_DOUBT else None), new


def released_row(taken: Taken) -> Delivery:
    """Return the row that releases a claim before its doubt, if any, is published.

    The next claim then gets the same answer as this one. Once the doubt is published, a `released` row
    without a reason releases the claim.
    """
    if taken.earlier is not None:
        return taken.earlier._replace(owner=taken.row.owner)
    return taken.row._replace(state="released")


def _has_unpublished_doubt(row: Delivery) -> bool:
    return row.state == "released" and row.reason == IN_DOUBT


def _wait(row: Delivery, now: datetime) -> Wait:
    return Wait(max(0.0, (row.lease_until - now).total_seconds()))


def _cancel(
    row: Delivery | None, request: Cancel, now: datetime, take_over: bool
) -> tuple[ClaimAnswer, Delivery | None]:
    if row is None:
        new = initial_row(request, now)
        return Settled(new), new
    if row.state == "sent":
        return Settled(row), None
    if row.epoch > request.epoch:
        return Stale(), None
    if row.state == "sending":
        if row.lease_until > now or not take_over:
            return _wait(row, now), None
        new = _uncertain(row, request.epoch, row.attempt, request.owner, now)
        return Settled(new), new
    if row.epoch == request.epoch and row.state in NOT_COMPLETED:
        return Settled(row), None
    if row.doubts_in_all or row.reason == IN_DOUBT:
        new = _uncertain(row, request.epoch, row.attempt, request.owner, now)
    else:
        new = row._replace(state="cancelled", epoch=request.epoch, owner=request.owner)
    return Settled(new), new


def _taken(row: Delivery, claim: Claim, until: datetime) -> Delivery:
    in_doubt = row.state == "sending" or row.reason == IN_DOUBT
    found = in_doubt and not _has_unpublished_doubt(row)
    in_epoch = row.doubts_in_epoch + found if row.epoch == claim.epoch else int(row.state == "sending")
    return initial_row(claim, until)._replace(
        doubts_in_all=row.doubts_in_all + found,
        message_id=row.message_id or claim.message_id,
        reason=IN_DOUBT if in_doubt else "",
        doubts_in_epoch=in_epoch,
    )


def _uncertain(row: Delivery, epoch: int, attempt: int, owner: bytes, now: datetime) -> Delivery:
    return row._replace(
        state="uncertain",
        epoch=epoch,
        attempt=attempt,
        owner=owner,
        settled_at=to_micros(now),
        next_attempt_at=0,
        reason=IN_DOUBT,
        reply="",
    )
