"""What may be done with a task's delivery, decided from its row in `deliveries`. Pure.

A row and a claim are compared by (epoch, attempt). What a Claim is answered:

| row's state            | claim is older | same            | later attempt   | later epoch     |
| ---------------------- | -------------- | --------------- | --------------- | --------------- |
| none                   | Taken          | Taken           | Taken           | Taken           |
| `sent`                 | Stored         | Stored          | Stored          | Stored          |
| `sending`, lease runs  | Stale          | Wait            | Wait            | Wait            |
| `sending`, lease over  | Stale          | in doubt        | in doubt        | in doubt        |
| `released`             | Stale          | Taken           | Taken           | Taken           |
| `released`, untold     | Stale          | in doubt        | in doubt        | in doubt        |
| `deferred`             | Stale          | Stored          | Taken           | Taken           |
| `failed`               | Stale          | Stored          | Stored          | Taken           |
| `uncertain`            | Stale          | Stored          | Stored          | Taken           |
| `cancelled`            | Stale          | Stored          | Stored          | Taken           |

In doubt: the last owner is gone and may have handed the mail over. While the epoch has a resend left the row
is taken (`Taken` with `doubtful`), else it is made `uncertain` and that is answered as Stored. Policy `hold`
has no resends.

Untold: its reason is `in_doubt`. A claim counts the doubt that it finds, and its row keeps that reason until
the doubt is on record. Given back before, the next claim finds the same doubt and does not count it again.

Stored: publish the row's outcome once more; its sender may have died before it did. Stale: the record
was overtaken by a later one, which is told the outcome: nothing to do, nothing to tell. `sent` is told to
everyone, since it is true of every epoch.

What a Cancel (of epoch e) is answered; it compares epochs alone:

| row's state                             | row's epoch > e | = e             | < e                |
| --------------------------------------- | --------------- | --------------- | ------------------ |
| none                                    | -               | now cancelled   | now cancelled      |
| `sent`                                  | Stored          | Stored          | Stored             |
| `sending`, lease runs                   | Stale           | Wait            | Wait               |
| `sending`, lease over                   | Stale           | now uncertain   | now uncertain      |
| `released`, `deferred`                  | Stale           | now cancelled*  | now cancelled*     |
| `failed`, `uncertain`, `cancelled`      | Stale           | Stored          | now cancelled*     |

A cancel waits for a running claim because that may end as `deferred`, and the next attempt must not
send. (*) A mail that was ever in doubt, in whatever attempt or epoch, is `uncertain` when it is cancelled,
under either policy: it must not be sent again, and that it was never sent cannot be promised.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import Enum
from typing import Literal, NamedTuple

from services.common.database.times import to_micros

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
    "Settlement",
    "Stale",
    "Stored",
    "Taken",
    "Wait",
    "decide",
    "initial_row",
    "may_resend",
    "released_row",
    "settlement",
]

DeliveryState = Literal["sending", "released", "deferred", "failed", "sent", "uncertain", "cancelled"]

# The reason of every outcome that leaves open whether the mail was delivered.
IN_DOUBT = "in_doubt"
# The reasons of the outcomes that an operator found: the mail was not sent; it was sent.
NOT_SENT = "not_sent"
RESOLVED = "resolved"
NO_OWNER = bytes(16)
"""The owner of a row that no claim made."""


class Delivery(NamedTuple):
    """A row of `deliveries`, its columns in this order. `owner` is never used by two claims."""

    task_id: bytes
    state: DeliveryState
    epoch: int
    attempt: int
    # How often the mail was in doubt when a claim was taken: taken over, or left so by an earlier attempt.
    takeovers: int
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
    # How often the epoch's mail was in doubt before this claim; its mail goes out once more for each.
    doubts: int = 0


class Claim(NamedTuple):
    """A wish to send. `message_id` is used unless an earlier attempt has already sent under another one."""

    task_id: bytes
    epoch: int
    attempt: int
    owner: bytes
    message_id: str


class Cancel(NamedTuple):
    """A wish that the task be sent no more, in its epoch and those before."""

    task_id: bytes
    epoch: int
    owner: bytes


class Taken(NamedTuple):
    """The caller owns the row and may send, once it is on record that the mail may then go out twice.

    `doubtful`: it was taken from an owner who may have handed the mail over, or who gave it back before such
    a doubt was on record. `earlier`: the row of an earlier attempt that ended in doubt; its own event may
    have died with its sender. `since`: the claimer's monotonic clock before it asked.
    """

    row: Delivery
    doubtful: bool = False
    earlier: Delivery | None = None
    since: float = 0.0


class Wait(NamedTuple):
    """Another's claim runs for these seconds more unless renewed; ask again then.

    0: its lease is over, and it may not be taken over yet.
    """

    seconds: float


class Stored(NamedTuple):
    """The outcome is known; publish it."""

    row: Delivery


class Stale(NamedTuple):
    """A later record has taken this one's place."""


ClaimAnswer = Taken | Wait | Stored | Stale


def initial_row(request: Claim | Cancel, lease_until: datetime) -> Delivery:
    """Return the row that a request makes where there was none."""
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
    """Return whether a mail that was in doubt so often in its epoch, this time included, goes out again."""
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
    """Return the answer to `request` and the row to write, None where it stays as it is.

    `now` is the database's time, at or before the moment the row was read. `hold`: what is in doubt is
    held, not sent again; otherwise it is sent again `max_resends` times at most. Without `take_over` a
    lease that is over counts as running. Asked again by the same owner (its first answer was lost), it
    answers the same, but for an `earlier` row: it has replaced that, and answers `doubtful` instead.
    """
    if isinstance(request, Cancel):
        return _cancel(row, request, now, take_over)
    until = now + lease
    if row is None:
        new = initial_row(request, until)
        return Taken(new), new
    if row.state == "sent":
        return Stored(row), None
    if row.state == "sending" and row.owner == request.owner:
        new = row._replace(lease_until=until)
        return Taken(new, doubtful=row.reason == IN_DOUBT), new
    if (request.epoch, request.attempt) < (row.epoch, row.attempt):
        return Stale(), None
    if row.state == "sending" and (row.lease_until > now or not take_over):
        return _wait(row, now), None
    if row.state == "sending" or _untold(row):
        new = _taken(row, request, until)
        if not may_resend(new.doubts, hold, max_resends):
            new = _uncertain(row, request.epoch, request.attempt, request.owner, now)
            return Stored(new), new
        return Taken(new, doubtful=True), new
    free = (
        row.state == "released"
        or request.epoch > row.epoch
        or (row.state == "deferred" and request.attempt > row.attempt)
    )
    if not free:
        return Stored(row), None
    new = _taken(row, request, until)
    return Taken(new, earlier=row if row.reason == IN_DOUBT else None), new


def released_row(taken: Taken) -> Delivery:
    """Return the row to settle where a claim ends before its doubt, if any, is on record.

    The next claim is then answered as this one was. Once the doubt is on record, give back a `released` row
    without a reason instead.
    """
    if taken.earlier is not None:
        return taken.earlier._replace(owner=taken.row.owner)
    return taken.row._replace(state="released")


def _untold(row: Delivery) -> bool:
    return row.state == "released" and row.reason == IN_DOUBT


def _wait(row: Delivery, now: datetime) -> Wait:
    return Wait(max(0.0, (row.lease_until - now).total_seconds()))


def _cancel(
    row: Delivery | None, request: Cancel, now: datetime, take_over: bool
) -> tuple[ClaimAnswer, Delivery | None]:
    if row is None:
        new = initial_row(request, now)
        return Stored(new), new
    if row.state == "sent":
        return Stored(row), None
    if row.epoch > request.epoch:
        return Stale(), None
    if row.state == "sending":
        if row.lease_until > now or not take_over:
            return _wait(row, now), None
        new = _uncertain(row, request.epoch, row.attempt, request.owner, now)
        return Stored(new), new
    if row.epoch == request.epoch and row.state in ("failed", "uncertain", "cancelled"):
        return Stored(row), None
    if row.takeovers or row.reason == IN_DOUBT:
        new = _uncertain(row, request.epoch, row.attempt, request.owner, now)
    else:
        new = row._replace(state="cancelled", epoch=request.epoch, owner=request.owner)
    return Stored(new), new


def _taken(row: Delivery, claim: Claim, until: datetime) -> Delivery:
    in_doubt = row.state == "sending" or row.reason == IN_DOUBT
    found = in_doubt and not _untold(row)
    return initial_row(claim, until)._replace(
        takeovers=row.takeovers + found,
        message_id=row.message_id or claim.message_id,
        reason=IN_DOUBT if in_doubt else "",
        doubts=row.doubts + found if row.epoch == claim.epoch else int(row.state == "sending"),
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


class Settlement(Enum):
    """What becomes of a settle."""

    STORED = "stored"
    """The claim was still the caller's."""
    LATE = "late"
    """The claim was lost, but that the mail was accepted is true whoever owns the claim: stored too."""
    FENCED = "fenced"
    """The claim was lost; the row is another's and says what is so."""


def settlement(row: Delivery | None, settled: Delivery) -> tuple[Settlement, Delivery | None]:
    """Return what becomes of the wish to write `settled`, and the row to write, None where it stays as it is.

    `settled` is the claimed row with its outcome; told twice, it is stored once.
    """
    if row is not None and row.owner == settled.owner:
        if row.state == "sending":
            return Settlement.STORED, settled
        if row.state == settled.state:
            # Told twice, and late the first time: the row stands for another event than the caller's.
            same = (row.epoch, row.attempt) == (settled.epoch, settled.attempt)
            return Settlement.STORED if same else Settlement.LATE, None
    if settled.state != "sent" or (row is not None and row.state == "sent"):
        return Settlement.FENCED, None
    if row is None or (row.epoch, row.attempt) < (settled.epoch, settled.attempt):
        return Settlement.LATE, settled
    late = settled._replace(epoch=row.epoch, attempt=row.attempt, takeovers=row.takeovers)
    return Settlement.LATE, late
