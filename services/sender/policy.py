"""The outcome of an attempt: from the result of a send to the delivery's row. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.deliveries.decide import IN_DOUBT, Delivery, may_resend
from services.common.stage.delays import choose_delay
from services.sender.replies import InDoubt, NotSent, Rejected, Sent

__all__ = ["CONNECTION_LOST", "DEFERRED", "EXPIRED", "REJECTED", "UNSENDABLE", "Policy"]

# The reasons that clients see, besides IN_DOUBT.
REJECTED = "rejected"
DEFERRED = "deferred"
CONNECTION_LOST = "connection_lost"
EXPIRED = "expired"
UNSENDABLE = "unsendable"

_MAX_REPLY = 1024
_MAX_RELAY = 255


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide an attempt's outcome.

    `delays`: seconds before each further attempt, rising; the last one repeats. `max_age`: seconds after
    which a task expires. With `hold` a mail in doubt becomes uncertain. Otherwise it is sent again, at most
    `max_resends` times an epoch.
    """

    delays: Sequence[int]
    max_age: int
    hold: bool
    max_resends: int = 1

    def outcome_row(
        self,
        claimed: Delivery,
        result: Sent | Rejected | NotSent | InDoubt,
        age_start_us: int,
        now_us: int,
        rng: random.Random,
    ) -> Delivery:
        """Return the claimed row with its outcome.

        `age_start_us` is when the task's age began. It and `now_us` are microseconds since the Unix epoch.
        The caller does not pass a NotSent with `spares_attempt`, which ends no attempt.
        """
        if isinstance(result, Sent):
            return self.sent_row(claimed, result, now_us)
        reply = result.reply if isinstance(result, Rejected) else result.unparsed
        row = claimed._replace(
            settled_at=now_us,
            reason="",
            reply=reply[:_MAX_REPLY],
            relay=result.relay[:_MAX_RELAY],
        )
        match result:
            case Rejected(permanent=True):
                return row._replace(state="failed", reason=REJECTED)
            case Rejected(retry_after=after):
                return self._defer(row, DEFERRED, age_start_us, rng, after or 0)
            case NotSent():
                return self._defer(row, CONNECTION_LOST, age_start_us, rng)
            case InDoubt():
                if not may_resend(claimed.doubts_in_epoch + 1, self.hold, self.max_resends):
                    return row._replace(state="uncertain", reason=IN_DOUBT)
                return self._defer(row, IN_DOUBT, age_start_us, rng)

    def sent_row(self, claimed: Delivery, result: Sent, now_us: int) -> Delivery:
        """Return the claimed row of a mail that the relay took at `now_us`."""
        return claimed._replace(
            state="sent",
            settled_at=now_us,
            reason="",
            reply=result.reply[:_MAX_REPLY],
            relay=result.relay[:_MAX_RELAY],
        )

    def unsendable(self, claimed: Delivery, now_us: int) -> Delivery:
        """Return the failed row of a claimed task from which no mail can be built."""
        return claimed._replace(state="failed", settled_at=now_us, reason=UNSENDABLE)

    def expired(self, claimed: Delivery, age_start_us: int, now_us: int) -> Delivery | None:
        """Return the row of a claimed task that has expired; None if it has not.

        The times are those of `settled`. A task with an earlier attempt in doubt becomes uncertain.
        """
        if now_us - age_start_us <= self.max_age * 1_000_000:
            return None
        row = claimed._replace(settled_at=now_us)
        if row.doubts_in_all or row.reason == IN_DOUBT:
            return row._replace(state="uncertain", reason=IN_DOUBT)
        return row._replace(state="failed", reason=EXPIRED)

    def _defer(
        self, row: Delivery, reason: str, age_start_us: int, rng: random.Random, after: float = 0
    ) -> Delivery:
        """Return the row as deferred, or as expired.

        A server may ask to wait for `after` seconds. The policy grants a longer wait as far as the delays go,
        and no shorter one: some servers ask for it after every attempt.
        """
        expired = self.expired(row._replace(reason=reason), age_start_us, row.settled_at)
        if expired is not None:
            return expired
        step = self.delays[min(row.attempt, len(self.delays)) - 1]
        _, due_ms = choose_delay(self.delays, max(step, after), row.settled_at // 1000, rng)
        return row._replace(state="deferred", reason=reason, next_attempt_at=due_ms * 1000)
