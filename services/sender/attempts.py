"""The steps of a sender's attempts: claim, compose, send, settle.

Each step is a callback, so an attempt costs no asyncio task. Only a wait for the relay and the publishing of
a doubt have a task of their own. What arrives while one call of the database runs makes the next one.

Where a sender dies between two steps, the task's next claim finds out and decides
(services/common/deliveries/decide.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial, wraps
from typing import Concatenate, NamedTuple, ParamSpec, cast

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import (
    Claim,
    ClaimAnswer,
    Delivery,
    Stale,
    Taken,
    Wait,
    released_row,
)
from services.common.deliveries.row_events import event_of
from services.common.deliveries.settlement import Settlement
from services.common.stage.delays import choose_delay
from services.common.stage.types import Done, Finish, Outcome, Record, Retry
from services.sender import replies
from services.sender.async_claims import AsyncClaims
from services.sender.attempt import Attempt, Step
from services.sender.call_queue import CallQueue
from services.sender.cancelled import CancelledAttempts, Pool, Publish
from services.sender.composer import ComposedMail, Composer
from services.sender.leases import Lease, Leases
from services.sender.metrics import SENDER_SECONDS, SENDER_SHED, SENDER_SKIPPED
from services.sender.outcome_of_record import outcome_of_record, takeover_event
from services.sender.policy import Policy
from services.sender.slots import Slots
from services.sender.smtp_mail import OutgoingMail
from services.sender.store_outcome import log_doubt, note_outcomes

__all__ = ["Attempts", "poll_seconds"]

# A claim that another owner holds is asked for again this often (seconds): most claims end long before their
# lease.
_CLAIM_POLL_SECONDS = 0.5

P = ParamSpec("P")
_Step = Callable[Concatenate["Attempts", Attempt, P], None]


def _step(step: _Step[P]) -> _Step[P]:
    """Let an exception of a step end its attempt alone."""

    @wraps(step)
    def guarded(self: Attempts, attempt: Attempt, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            step(self, attempt, *args, **kwargs)
        except Exception as error:
            self._fail(attempt, error)

    return cast(_Step[P], guarded)


class Attempts:
    """The attempts of one sender. Belongs to one event loop. `Sender` documents the arguments."""

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
        handover: float,
        now_us: Callable[[], int],
        rng: random.Random,
    ) -> None:
        self._claims, self._leases, self._pool = claims, leases, pool
        self._composer, self._policy = composer, policy
        self.claim_slots, self.session_slots = claim_slots, session_slots
        self._publish, self._owner, self._now_us = publish, owner, now_us
        self._rng = rng
        self._finish: Finish = lambda outcomes: None
        self._running: dict[Record, Attempt] = {}
        self._to_claim = CallQueue(self._claim)
        self._to_store = CallQueue(self._store)
        self.cancelled = CancelledAttempts(
            claims=claims,
            pool=pool,
            publish=publish,
            owner=owner,
            row_after_send=self._row_after_send,
            handover=handover,
        )

    def start(self, records: Sequence[Record], finish: Finish) -> None:
        """Begin the attempts of records of `mx.ok`; `finish` takes their outcomes."""
        self._finish = finish
        for record in records:
            attempt = Attempt(record, self.claim_slots, self.session_slots, self._leases)
            self._running[record] = attempt
            self._begin(attempt)

    def cancel(self, record: Record) -> None:
        """End the record's attempt early. Its mail goes on if it was handed over."""
        attempt = self._running.pop(record, None)
        if attempt is not None:
            self.cancelled.add(attempt)

    def outcome_of_record(self, row: Delivery) -> Outcome:
        """Return the outcome of the record whose delivery is settled as `row`."""
        return outcome_of_record(row, self._policy.delays, self._now_us() // 1000)

    # --- before the claim ---

    @_step
    def _begin(self, attempt: Attempt) -> None:
        attempt.step, attempt.waiting_for, attempt.probe = Step.TURN, None, False
        # The sender claims nothing while it can send nothing: if it dies then, no mail is in doubt.
        if self._pool.available:
            self._await_claim_slot(attempt)
        else:
            self._run(attempt, self._await_relay)

    async def _await_relay(self, attempt: Attempt) -> None:
        await self._pool.wait_available()
        attempt.probe = not self._pool.available
        self._await_claim_slot(attempt)

    def _await_claim_slot(self, attempt: Attempt) -> None:
        if self.session_slots.is_stalled(attempt.domain):
            self._defer_untried(attempt)
        elif self.claim_slots.acquire(attempt.domain):
            self._ask_for_claim(attempt)
        else:
            turn = partial(self._on_claim_slot, attempt)
            attempt.waiting_for = self.claim_slots.wait(attempt.domain, turn)

    @_step
    def _on_claim_slot(self, attempt: Attempt, granted: bool) -> None:
        attempt.waiting_for = None
        if granted:
            self._ask_for_claim(attempt)
        else:
            self._defer_untried(attempt)

    def _ask_for_claim(self, attempt: Attempt) -> None:
        attempt.has_claim_slot, attempt.tried = True, False
        # The relay may have gone down during the wait; one mail may still be tried.
        if not (self._pool.available or attempt.probe):
            attempt.release()
            self._begin(attempt)
            return
        event = attempt.event
        task_id = event.task.id
        message_id = self._composer.message_id(task_id)
        attempt.claim = Claim(task_id, event.epoch, attempt.record.attempt, self._owner(), message_id)
        attempt.step = Step.CLAIM
        self._to_claim.add(attempt)

    def _defer_untried(self, attempt: Attempt) -> None:
        SENDER_SHED.inc()
        delays = self._policy.delays
        delay, due_at_ms = choose_delay(delays, delays[0], self._now_us() // 1000, self._rng)
        self._end(attempt, Retry(delay, due_at_ms, f"too many wait for {attempt.domain}", counts=False))

    # --- from the claim to the mail ---

    async def _claim(self, attempts: list[Attempt]) -> None:
        answers: Sequence[ClaimAnswer | Exception]
        for attempt in attempts:
            if attempt.cancelled is not None:
                self.cancelled.on_result(attempt, None)
        attempts = [attempt for attempt in attempts if attempt.cancelled is None]
        if not attempts:
            return
        try:
            answers = await self._claims.claim_all([cast(Claim, attempt.claim) for attempt in attempts])
        except Exception as error:
            answers = [error] * len(attempts)
        for attempt, answer in zip(attempts, answers, strict=True):
            try:
                self._on_answer(attempt, answer)
            except Exception as error:
                self._fail(attempt, error)

    def _on_answer(self, attempt: Attempt, answer: ClaimAnswer | Exception) -> None:
        if attempt.cancelled is not None:
            self.cancelled.on_answer(attempt, answer)
            return
        attempt.step = Step.TURN
        if isinstance(answer, Taken):
            self._on_taken(attempt, answer)
            return
        if isinstance(answer, Exception):
            raise answer
        attempt.release()
        if isinstance(answer, Wait):
            loop = asyncio.get_running_loop()
            attempt.waiting_for = loop.call_later(poll_seconds(answer), self._begin, attempt)
            return
        SENDER_SKIPPED.labels("stale" if isinstance(answer, Stale) else "stored").inc()
        if isinstance(answer, Stale):
            self._end(attempt, Done())
            return
        if answer.row.owner == cast(Claim, attempt.claim).owner:
            log_doubt(answer.row, "takeover")
        self._end(attempt, self.outcome_of_record(answer.row))

    def _on_taken(self, attempt: Attempt, taken: Taken) -> None:
        row = taken.row
        attempt.row = row._replace(reason="") if row.reason else row
        attempt.lease = self._leases.hold(attempt.row, taken.since)
        if taken.earlier is None and not taken.doubtful:
            self._compose(attempt)
            return
        attempt.undo = released_row(taken)
        self._run(attempt, partial(self._publish_doubt, taken=taken))

    async def _publish_doubt(self, attempt: Attempt, taken: Taken) -> None:
        """Publish that the mail may have gone out, before it goes out again."""
        if taken.earlier is not None:
            await self._publish([event_of(taken.earlier)], attempt.record.traceparent)
        if taken.doubtful:
            event = takeover_event(taken.row, self._now_us())
            await self._publish([event], attempt.record.traceparent)
            log_doubt(taken.row, "takeover")
        self._compose(attempt)

    def _compose(self, attempt: Attempt) -> None:
        row = attempt.undo = cast(Delivery, attempt.row)
        try:
            mail = self._composer.compose(attempt.event, row.message_id)
        except ValueError as error:
            self._settle_unsendable(attempt, error)
            return
        if self.session_slots.acquire(attempt.domain):
            self._send(attempt, mail)
        else:
            turn = partial(self._on_session, attempt, mail)
            attempt.waiting_for = self.session_slots.wait(attempt.domain, turn)

    @_step
    def _on_session(self, attempt: Attempt, mail: ComposedMail, granted: bool) -> None:
        attempt.waiting_for = None
        if granted:
            self._send(attempt, mail)
        else:
            released = cast(Delivery, attempt.row)._replace(state="released")
            self._store_later(attempt, released, then=self._defer_untried)

    def _send(self, attempt: Attempt, mail: ComposedMail) -> None:
        attempt.has_session = True
        row = cast(Delivery, attempt.row)
        # The mail may have expired while it waited for the session.
        expired = self._policy.expired(row, _age_start_us(attempt.event), self._now_us())
        if expired is not None:
            self._store_later(attempt, expired)
            attempt.release_session()
            return
        attempt.step, attempt.undo = Step.SEND, None
        attempt.started = time.perf_counter()
        guard = cast(Lease, attempt.lease).holds
        attempt.mail = OutgoingMail(*mail, guard, partial(self._on_result, attempt))
        try:
            self._pool.submit(attempt.mail)
        except ValueError as error:
            self._settle_unsendable(attempt, error)
            attempt.release_session()

    # --- after the mail ---

    @_step
    def _on_result(self, attempt: Attempt, result: replies.SendResult) -> None:
        SENDER_SECONDS.observe(time.perf_counter() - attempt.started)
        # The mail knows its attempt: without this they would be garbage only to the collector of cycles.
        attempt.mail = None
        if attempt.cancelled is not None:
            self.cancelled.on_result(attempt, result)
            return
        new_row = self._row_after_send(attempt, result)
        if new_row.state == "released":
            self._store_later(attempt, new_row, then=self._begin)
        else:
            attempt.tried = True
            attempt.handed_over = _handed_over(result)
            self._store_later(attempt, new_row, result)
        attempt.release_session()

    def _row_after_send(self, attempt: Attempt, result: replies.SendResult) -> Delivery:
        """Return the row to store after a send; a released one where the send was no attempt."""
        row = cast(Delivery, attempt.row)
        if isinstance(result, replies.Sent):
            return self._policy.sent_row(row, result, self._now_us())
        if isinstance(result, replies.LeaseLost) or (
            isinstance(result, replies.NotSent) and result.spares_attempt
        ):
            return row._replace(state="released")
        age_start_us = _age_start_us(attempt.event)
        return self._policy.outcome_row(row, result, age_start_us, self._now_us(), self._rng)

    def _settle_unsendable(self, attempt: Attempt, error: ValueError) -> None:
        failed = self._policy.unsendable(cast(Delivery, attempt.row), self._now_us())
        self._store_later(attempt, failed, cause=str(error))

    def _store_later(
        self,
        attempt: Attempt,
        new_row: Delivery,
        result: replies.SendResult | None = None,
        cause: str = "",
        then: Callable[[Attempt], None] | None = None,
    ) -> None:
        """Store an outcome, or release the claim and then go on with `then`."""
        attempt.step, attempt.undo = Step.STORE, None
        self._to_store.add(_Storing(attempt, new_row, result, cause, then))

    async def _store(self, storing: list[_Storing]) -> None:
        settlements: Sequence[Settlement | Exception]
        try:
            settlements = await self._claims.store_all([one.new_row for one in storing])
        except Exception as error:
            settlements = [error] * len(storing)
        note_outcomes(storing, settlements)
        stored: list[tuple[Record, Outcome]] = []
        for one, settlement in zip(storing, settlements, strict=True):
            attempt = one.attempt
            try:
                if attempt.cancelled is not None:
                    self.cancelled.on_result(attempt, settlement)
                elif isinstance(settlement, Exception):
                    raise settlement
                elif one.then is None and settlement is Settlement.STORED:
                    del self._running[attempt.record]
                    stored.append((attempt.record, self.outcome_of_record(one.new_row)))
                    attempt.release()
                else:
                    attempt.release()
                    (one.then or self._begin)(attempt)
            except Exception as error:
                self._fail(attempt, error)
        if stored:
            self._finish(stored)

    # --- ends ---

    def _end(self, attempt: Attempt, outcome: Outcome | Exception) -> None:
        self._running.pop(attempt.record, None)
        self._finish([(attempt.record, outcome)])

    def _fail(self, attempt: Attempt, error: Exception) -> None:
        self.cancelled.undo(attempt)
        self._end(attempt, error)

    def _run(self, attempt: Attempt, work: Callable[[Attempt], Awaitable[None]]) -> None:
        """Let the attempt wait in a task of its own."""

        async def guarded() -> None:
            try:
                await work(attempt)
            except Exception as error:
                self._fail(attempt, error)

        attempt.waiting_for = asyncio.get_running_loop().create_task(guarded())


class _Storing(NamedTuple):
    """A row to be stored, and what the attempt does afterwards; without `then` it ends."""

    attempt: Attempt
    new_row: Delivery
    result: replies.SendResult | None
    cause: str
    then: Callable[[Attempt], None] | None


def poll_seconds(wait: Wait) -> float:
    """Return the seconds until a claim that another owner holds is asked for again."""
    # A lease that has ended and may not be taken over yet leaves 0 seconds.
    return min(wait.seconds, _CLAIM_POLL_SECONDS) or _CLAIM_POLL_SECONDS


def _age_start_us(event: pb.MxOk) -> int:
    return max(event.task.created_at_us, event.at_us, event.epoch * 1000)


def _handed_over(result: replies.SendResult | None) -> bool:
    return isinstance(result, replies.Sent | replies.InDoubt) or (
        isinstance(result, replies.Rejected) and result.phase is replies.Phase.AFTER_DOT
    )
