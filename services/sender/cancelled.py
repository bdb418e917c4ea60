"""What goes on after an attempt was cancelled: its claim is released, its mail's outcome is stored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, cast

from services.common.deliveries.decide import Claim, ClaimAnswer, Delivery, Settled, Taken, released_row
from services.common.deliveries.row_events import event_of
from services.common.deliveries.settlement import Settlement
from services.common.events import Event
from services.sender import replies
from services.sender.async_claims import AsyncClaims
from services.sender.attempt import Attempt, Step
from services.sender.cleanup import Cleanups, within
from services.sender.smtp_mail import OutgoingMail
from services.sender.store_outcome import store_outcome

__all__ = ["CancelledAttempts", "Pool", "Publish", "RowAfterSend"]

Publish = Callable[[Sequence[Event], bytes | None], Awaitable[None]]
"""Publishes events under a traceparent, and returns once all are acked, however long that takes."""
RowAfterSend = Callable[[Attempt, replies.SendResult], Delivery]
"""Returns the row to store after a send; a released one where the send was no attempt."""

# The last writes may take this long (seconds), unless the mail was handed over.
_CLEANUP_TIMEOUT = 5.0


class Pool(Protocol):
    """What the stage needs of the SMTP client; `SmtpPool` says what each does."""

    @property
    def available(self) -> bool: ...

    async def wait_available(self) -> None: ...

    def submit(self, mail: OutgoingMail) -> None: ...

    def withdraw(self, mail: OutgoingMail) -> bool: ...

    def cut_off(self, mail: OutgoingMail) -> None: ...


class CancelledAttempts:
    """The attempts of one sender that were cancelled, or that failed. Belongs to one event loop.

    `handover` is how long (seconds) a handed-over mail may go on.
    """

    def __init__(
        self,
        *,
        claims: AsyncClaims,
        pool: Pool,
        publish: Publish,
        owner: Callable[[], bytes],
        row_after_send: RowAfterSend,
        handover: float,
    ) -> None:
        self._claims, self._pool, self._publish, self._owner = claims, pool, publish, owner
        self._row_after_send, self._handover = row_after_send, handover
        self._cleanups = Cleanups()

    @property
    def handed_over(self) -> int:
        """Handed-over mails whose outcomes are not stored yet."""
        return self._cleanups.handed_over

    async def close(self) -> None:
        """Wait until the claims are released and the outcomes stored."""
        await self._cleanups.close()

    def add(self, attempt: Attempt) -> None:
        """End an attempt early. Its mail goes on if it was handed over. Does not block."""
        if attempt.step is Step.TURN:
            if attempt.waiting_for is not None:
                attempt.waiting_for.cancel()
            self.undo(attempt)
            return
        if attempt.step is Step.SEND and self._pool.withdraw(attempt.mail):
            attempt.undo = attempt.row
            self.undo(attempt)
            return
        call = attempt.cancelled = asyncio.get_running_loop().create_future()
        if attempt.step is Step.CLAIM:
            attempt.release()
            self._cleanups.run(within(call, _CLEANUP_TIMEOUT))
        elif attempt.step is Step.SEND:
            attempt.tried = True
            self._cleanups.run(self._finish_handover(attempt), attempt.release, handed_over=True)
        else:
            limit = self._handover if attempt.handed_over else _CLEANUP_TIMEOUT
            storing = self._publish_if_late(within(call, limit), cast(Delivery, attempt.row))
            self._cleanups.run(storing, attempt.release, handed_over=attempt.handed_over)

    def on_answer(self, attempt: Attempt, answer: ClaimAnswer | Exception) -> None:
        """Take the answer to a cancelled attempt's claim, and release the claim, however late it is."""
        if isinstance(answer, Taken):
            # Nobody else would release it before its lease is over.
            self._cleanups.run(within(self._claims.store(released_row(answer)), _CLEANUP_TIMEOUT))
        self.on_result(attempt, answer)

    def on_result(self, attempt: Attempt, result: object) -> None:
        """Take the result of the call for which a cancelled attempt waits."""
        call = cast("asyncio.Future[object]", attempt.cancelled)
        if call.done():
            return
        if isinstance(result, Exception):
            call.set_exception(result)
        else:
            call.set_result(result)

    def undo(self, attempt: Attempt) -> None:
        """Release all that the attempt holds, its claim too where `undo` has the row for that."""
        row, attempt.undo = attempt.undo, None
        attempt.release()
        if row is not None:
            released = row._replace(state="released") if row.state == "sending" else row
            self._cleanups.run(within(self._claims.store(released), _CLEANUP_TIMEOUT))

    async def _finish_handover(self, attempt: Attempt) -> None:
        """Wait for the reply to a handed-over mail and settle its row; the next owner publishes the event."""
        replied = cast("asyncio.Future[replies.SendResult]", attempt.cancelled)
        now = asyncio.get_running_loop().time
        until = now() + self._handover
        await asyncio.wait({replied}, timeout=self._handover)
        if not replied.done():
            self._pool.cut_off(attempt.mail)
        result = await replied
        new_row = self._row_after_send(attempt, result)
        released = new_row.state == "released"
        storing = self._claims.store(new_row) if released else store_outcome(self._claims, new_row, result)
        await self._publish_if_late(within(storing, max(until - now(), _CLEANUP_TIMEOUT)), new_row)

    async def _publish_if_late(self, storing: Awaitable[Settlement | None], new_row: Delivery) -> None:
        """Store an outcome; publish it if that was late: the next owner may have published another one."""
        if await storing is not Settlement.LATE:
            return
        claim = Claim(new_row.task_id, new_row.epoch, new_row.attempt, self._owner(), new_row.message_id)
        answer = await within(self._claims.claim(claim), _CLEANUP_TIMEOUT)
        if isinstance(answer, Settled):
            await within(self._publish([event_of(answer.row)], None), _CLEANUP_TIMEOUT)
