"""The sender stage: it reads tasks whose domain takes mail, and publishes what became of each mail.

A handler claims the task, sends the mail and settles the delivery. Then the runtime publishes the event and
commits the offset. Where a sender dies between two of these steps, the task's next claim finds out and
decides (services/common/deliveries/decide.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol, cast

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import (
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settled,
    Stale,
    Taken,
    Wait,
    released_row,
)
from services.common.deliveries.row_events import event_of
from services.common.deliveries.settlement import Settlement
from services.common.events import Event
from services.common.stage.delays import choose_delay
from services.common.stage.types import Done, Outcome, Record, Retry, Stage
from services.common.stages import STAGES
from services.sender import replies
from services.sender.async_claims import AsyncClaims
from services.sender.cleanup import Cleanups, within
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.metrics import SENDER_SECONDS, SENDER_SHED, SENDER_SKIPPED
from services.sender.outcome_of_record import outcome_of_record, takeover_event
from services.sender.policy import Policy
from services.sender.slots import DomainSaturated, Slots
from services.sender.smtp_pool import SendCancelled
from services.sender.store_outcome import log_doubt, store_outcome

__all__ = ["DomainUse", "Pool", "Publish", "Sender", "stage"]

Publish = Callable[[Sequence[Event], bytes | None], Awaitable[None]]
"""Publishes events under a traceparent, and returns once all are acked, however long that takes."""

# A handler asks again for another owner's claim this often (seconds): most claims end long before their
# lease.
_CLAIM_POLL_SECONDS = 0.5
# A cancelled handler has this long (seconds) for its last writes, unless its mail was handed over.
_CLEANUP_TIMEOUT = 5.0


class DomainUse(NamedTuple):
    """What the mails to one recipient domain use of a sender."""

    name: str
    sessions: int
    claims: int
    """Claims of the domain, those with a session among them."""
    waiting: int
    """Records that wait for a claim slot."""
    still_seconds: float
    """Seconds since the domain last acquired or released a session."""


class Pool(Protocol):
    """What the stage needs of the SMTP client; `SmtpPool` says what each does."""

    @property
    def available(self) -> bool: ...

    async def wait_available(self) -> None: ...

    async def send(
        self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]
    ) -> replies.SendResult: ...


class Sender:
    """Handles the records of `mx.ok` and `task.cancelled`. Belongs to one event loop.

    `claim_slots` bounds the mails that are claimed and not settled, `session_slots` the mails that the pool
    sends. `owner` returns a new owner token at each call. `now_us` returns microseconds since the Unix epoch.
    `handover` is how long (seconds) a handed-over mail may go on after its handler was cancelled.
    """

    def __init__(
        self,
        *,
        claims: AsyncClaims,
        leases: Leases,
        pool: Pool,
        composer: Composer,
        policy: Policy,
        claim_slots: Slots,
        session_slots: Slots,
        publish: Publish,
        owner: Callable[[], bytes],
        handover: float = 620.0,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        rng: random.Random | None = None,
    ) -> None:
        self._claims, self._leases, self._pool = claims, leases, pool
        self._composer, self._policy = composer, policy
        self._claim_slots, self._session_slots = claim_slots, session_slots
        self._publish, self._owner, self._now_us = publish, owner, now_us
        self._handover = handover
        self._rng = rng or random.Random()
        self._cleanups = Cleanups()

    @property
    def handed_over(self) -> int:
        """Handed-over mails whose handlers were cancelled and whose outcomes are not stored yet."""
        return self._cleanups.handed_over

    def handle(self, record: Record) -> Awaitable[Outcome]:
        """Return a coroutine that ends when the record's task has an outcome.

        A cancelled handler releases its claim, unless the mail was handed over. Then the sender still waits
        for the server's reply and settles the delivery, and the partition's next owner publishes the event.
        """
        if isinstance(record.event, pb.TaskCancelled):
            return self._cancel(record.event)
        return self._deliver(record, cast(pb.MxOk, record.event))

    async def close(self) -> None:
        """Wait until the cleanups of cancelled handlers have ended.

        That takes seconds, or up to `handover` where a handed-over mail has no reply yet.
        """
        await self._cleanups.close()

    def domains(self) -> list[DomainUse]:
        """Return the domains that use or wait for sessions or claims, worst first. Safe on any thread."""
        sessions = {use.domain: use for use in self._session_slots.usage()}
        found = []
        for use in self._claim_slots.usage():
            session = sessions.get(use.domain)
            used, still = (session.used, session.unchanged_seconds) if session else (0, 0.0)
            found.append(DomainUse(use.domain, used, use.used, use.waiting, still))
        return sorted(found, key=lambda use: (-use.sessions, -use.claims, -use.waiting, use.name))

    async def _cancel(self, event: pb.TaskCancelled) -> Outcome:
        while True:
            answer = await self._claims.claim(Cancel(event.id, event.epoch, self._owner()))
            if isinstance(answer, Wait):
                await _wait_for_claim(answer)
                continue
            if isinstance(answer, Stale):
                return Done()
            return self._outcome_of_record(answer.row)

    async def _deliver(self, record: Record, event: pb.MxOk) -> Outcome:
        task = event.task
        message_id = self._composer.message_id(task.id)
        while True:
            # The sender claims nothing while it can send nothing: if it dies then, no mail is in doubt.
            probe = False
            if not self._pool.available:
                await self._pool.wait_available()
                probe = not self._pool.available
            if self._session_slots.is_stalled(task.domain):
                return self._defer_untried(task.domain)
            try:
                await self._claim_slots.acquire(task.domain)
            except DomainSaturated:
                return self._defer_untried(task.domain)
            # The slot does not count for the domain's rate where the relay was not tried.
            with ExitStack() as to_release, ExitStack() as rate_refund:
                to_release.callback(self._claim_slots.release, task.domain)
                rate_refund.callback(self._claim_slots.refund_rate, task.domain)
                # The relay may have gone down during the wait; one mail may still be tried.
                if not (self._pool.available or probe):
                    continue
                claim = Claim(task.id, event.epoch, record.attempt, self._owner(), message_id)
                answer = await self._claim(claim)
                if isinstance(answer, Taken):
                    try:
                        new_row = await self._attempt(answer, record, event, to_release, rate_refund)
                    except DomainSaturated:
                        return self._defer_untried(task.domain)
                    if new_row is None:
                        continue
                    return self._outcome_of_record(new_row)
            if isinstance(answer, Wait):
                await _wait_for_claim(answer)
                continue
            SENDER_SKIPPED.labels("stale" if isinstance(answer, Stale) else "stored").inc()
            if isinstance(answer, Stale):
                return Done()
            if answer.row.owner == claim.owner:
                log_doubt(answer.row, "takeover")
            return self._outcome_of_record(answer.row)

    async def _claim(self, claim: Claim) -> ClaimAnswer:
        # The call goes on when the handler is cancelled: only its answer says what to release.
        call = asyncio.ensure_future(self._claims.claim(claim))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            self._cleanups.run(within(self._release_claim(call), _CLEANUP_TIMEOUT))
            raise

    async def _attempt(
        self, taken: Taken, record: Record, event: pb.MxOk, to_release: ExitStack, rate_refund: ExitStack
    ) -> Delivery | None:
        """Send the claimed mail; return its settled row, or None where the claim must be asked for anew.

        The callbacks of `to_release` run when the attempt is over, those of `rate_refund` if the relay was
        not tried. Raises DomainSaturated where the domain's sessions are stalled; the claim is then released.
        """
        row = taken.row._replace(reason="")
        released = row._replace(state="released")
        lease = self._leases.hold(row, taken.since)
        to_release.callback(self._leases.drop, lease)
        # The row to store if this handler ends early, so that the next claim starts as this one did.
        undo: Delivery | None = released_row(taken)
        try:
            await self._publish_doubt(taken, record)
            undo = released
            try:
                mail = self._composer.compose(event, row.message_id)
            except ValueError as error:
                new_row = self._policy.unsendable(row, self._now_us())
                return await self._settle(new_row, to_release, cause=str(error))
            try:
                await self._session_slots.acquire(event.task.domain)
            except DomainSaturated:
                await self._claims.store(released)
                undo = None
                raise
            with ExitStack() as session:
                session.callback(self._session_slots.release, event.task.domain)
                # The mail may have expired while it waited for the session.
                expired = self._policy.expired(row, _age_start_us(event), self._now_us())
                if expired is not None:
                    return await self._settle(expired, to_release)
                undo = None
                started = time.perf_counter()
                try:
                    result = await self._pool.send(*mail, lease.holds)
                except SendCancelled as cancelled:
                    if cancelled.rest is None:
                        undo = released
                    else:
                        rate_refund.pop_all()
                        to_release.push(session.pop_all())
                        rest = self._finish_handover(cancelled.rest, row, event, started)
                        self._cleanups.run(rest, to_release, handed_over=True)
                    raise
                SENDER_SECONDS.observe(time.perf_counter() - started)
            new_row = self._row_after_send(row, result, event)
            if new_row.state == "released":
                undo = new_row
                await self._claims.store(new_row)
                return None
            rate_refund.pop_all()
            return await self._settle(new_row, to_release, result)
        except BaseException:
            if undo is not None:
                self._cleanups.run(within(self._claims.store(undo), _CLEANUP_TIMEOUT))
            raise

    def _row_after_send(self, row: Delivery, result: replies.SendResult, event: pb.MxOk) -> Delivery:
        """Return the row to store after a send; a released one where the send was no attempt."""
        if isinstance(result, replies.LeaseLost) or (
            isinstance(result, replies.NotSent) and result.spares_attempt
        ):
            return row._replace(state="released")
        return self._policy.outcome_row(row, result, _age_start_us(event), self._now_us(), self._rng)

    async def _publish_doubt(self, taken: Taken, record: Record) -> None:
        """Publish that the mail may have gone out, before it goes out again."""
        if taken.earlier is not None:
            await self._publish([event_of(taken.earlier)], record.traceparent)
        if taken.doubtful:
            await self._publish([takeover_event(taken.row, self._now_us())], record.traceparent)
            log_doubt(taken.row, "takeover")

    async def _settle(
        self,
        new_row: Delivery,
        to_release: ExitStack,
        result: replies.SendResult | None = None,
        cause: str = "",
    ) -> Delivery | None:
        """Store an attempt's outcome; a cancelled handler leaves that to a cleanup.

        Returns the row, or None where the claim was lost.
        """
        try:
            settlement = await store_outcome(self._claims, new_row, result, cause)
        except asyncio.CancelledError:
            handed_over = _handed_over(result)
            limit = self._handover if handed_over else _CLEANUP_TIMEOUT
            storing = within(store_outcome(self._claims, new_row, result, cause), limit)
            self._cleanups.run(self._publish_if_late(storing, new_row), to_release, handed_over=handed_over)
            raise
        return new_row if settlement is Settlement.STORED else None

    def _defer_untried(self, domain: str) -> Outcome:
        SENDER_SHED.inc()
        delays = self._policy.delays
        delay, due_at_ms = choose_delay(delays, delays[0], self._now_us() // 1000, self._rng)
        return Retry(delay, due_at_ms, f"too many wait for {domain}", counts=False)

    def _outcome_of_record(self, row: Delivery) -> Outcome:
        return outcome_of_record(row, self._policy.delays, self._now_us() // 1000)

    # --- cleanups ---

    async def _finish_handover(
        self, rest: asyncio.Task[replies.SendResult], row: Delivery, event: pb.MxOk, started: float
    ) -> None:
        """Wait for the reply to a handed-over mail and settle its row; the next owner publishes the event."""
        now = asyncio.get_running_loop().time
        until = now() + self._handover
        await asyncio.wait({rest}, timeout=self._handover)
        rest.cancel()
        result = await rest
        SENDER_SECONDS.observe(time.perf_counter() - started)
        new_row = self._row_after_send(row, result, event)
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

    async def _release_claim(self, call: Awaitable[ClaimAnswer]) -> None:
        """Release a claim whose handler was cancelled before it had the answer."""
        answer = await call
        if isinstance(answer, Taken):
            await self._claims.store(released_row(answer))


def stage(sender: Sender, delays: Sequence[int]) -> Stage:
    """Return the sender's stage for the runtime; `delays` are in seconds."""
    return Stage.of(STAGES["sender"], handle=sender.handle, delays=delays, close=sender.close)


async def _wait_for_claim(wait: Wait) -> None:
    # A lease that has ended and may not be taken over yet leaves 0 seconds.
    await asyncio.sleep(min(wait.seconds, _CLAIM_POLL_SECONDS) or _CLAIM_POLL_SECONDS)


def _age_start_us(event: pb.MxOk) -> int:
    return max(event.task.created_at_us, event.at_us, event.epoch * 1000)


def _handed_over(result: replies.SendResult | None) -> bool:
    return isinstance(result, replies.Sent | replies.InDoubt) or (
        isinstance(result, replies.Rejected) and result.phase is replies.Phase.AFTER_DOT
    )
