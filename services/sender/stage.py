"""The sender stage: a task whose domain takes mail comes in, what became of its mail goes out.

Claim, send, settle, then the runtime publishes and commits. What can go wrong between any two of these
steps is answered by the next one to claim the task (decide.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from uuid import UUID

import structlog

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import (
    IN_DOUBT,
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settlement,
    Stale,
    Stored,
    Taken,
    Wait,
    released_row,
)
from services.common.deliveries.outcome import event_of
from services.common.events import Event
from services.common.stage.delays import schedule
from services.common.stage.types import Done, Outcome, Record, Retry, Stage
from services.common.stages import STAGES
from services.sender import replies
from services.sender.answers import answer, takeover_event
from services.sender.async_claims import AsyncClaims
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.metrics import (
    SENDER_CROWDED,
    SENDER_FENCED,
    SENDER_IN_DOUBT,
    SENDER_OUTCOMES,
    SENDER_SECONDS,
    SENDER_SKIPPED,
)
from services.sender.policy import Policy
from services.sender.slots import DomainSaturated, Slots
from services.sender.smtp import SendCancelled

__all__ = ["DomainUse", "Pool", "Publish", "Sender", "stage"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

# Publishes and returns once all is acked, however long that takes.
Publish = Callable[[Sequence[Event], bytes | None], Awaitable[None]]

# A claim that another holds is asked for again this often (seconds): most are settled long before their
# lease ends.
_CLAIM_POLL_SECONDS = 0.5
# What a cancelled handler still has to write is given this long (seconds), unless it handed its mail over.
_CLEANUP_TIMEOUT = 5.0


class DomainUse(NamedTuple):
    """What a recipients' domain has of a sender: sessions, claims (those with a session among them), records
    that wait for a claim, and the seconds since one of its sessions was taken or given back."""

    name: str
    sessions: int
    claims: int
    waiting: int
    still_seconds: float


class Pool(Protocol):
    """What the stage needs of the SMTP client; `SmtpPool` says what each does."""

    @property
    def available(self) -> bool: ...

    async def wait_available(self) -> None: ...

    async def send(
        self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]
    ) -> replies.SendResult: ...


class Sender:
    """Handles `mx.ok` and `task.cancelled`. Belongs to one event loop.

    `claim_slots` bounds the mails that are claimed and not settled, `sessions` the mails that the pool sends.
    `owner` returns a new owner token at each call. `now_us` returns microseconds since the Unix epoch.
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
        sessions: Slots,
        publish: Publish,
        owner: Callable[[], bytes],
        handover: float = 620.0,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        rng: random.Random | None = None,
    ) -> None:
        self._claims, self._leases, self._pool = claims, leases, pool
        self._composer, self._policy, self._claim_slots, self._sessions = (
            composer,
            policy,
            claim_slots,
            sessions,
        )
        self._publish, self._owner, self._now_us = publish, owner, now_us
        self._handover = handover
        self._rng = rng or random.Random()
        self._cleanups: set[asyncio.Task[object]] = set()
        self.handed_over = 0
        """Mails that were handed over and go on without their handlers, not settled yet."""

    def handle(self, record: Record) -> Awaitable[Outcome]:
        """Return a coroutine that ends when the record's task has an outcome.

        Cancelled, it leaves the claim free where the mail was not handed over. What was handed over goes on:
        the sender waits for the server's reply and settles the row; the record's next owner publishes it.
        """
        if isinstance(record.event, pb.TaskCancelled):
            return self._cancel(record.event)
        return self._deliver(record, cast(pb.MxOk, record.event))

    async def close(self) -> None:
        """Return once cancelled handlers have left their claims as they should, or had the time to.

        That takes seconds, or as long as `handover` where a mail was handed over and is not answered.
        """
        if self.handed_over:
            log.info("mails were handed over: waiting for their replies", mails=self.handed_over)
        while self._cleanups:
            await asyncio.wait(self._cleanups)

    async def _cancel(self, event: pb.TaskCancelled) -> Outcome:
        while True:
            verdict = await self._claims.claim(Cancel(event.id, event.epoch, self._owner()))
            if isinstance(verdict, Wait):
                await _wait_for_claim(verdict)
                continue
            if isinstance(verdict, Stale):
                return Done()
            return self._answer(verdict.row)

    async def _deliver(self, record: Record, event: pb.MxOk) -> Outcome:
        task = event.task
        message_id = self._composer.message_id(task.id)
        while True:
            # Nothing is claimed while nothing can be sent: a sender that dies then leaves nothing in doubt.
            probe = False
            if not self._pool.available:
                await self._pool.wait_available()
                probe = not self._pool.available
            if self._sessions.is_stalled(task.domain):
                return self._defer_untried(task.domain)
            try:
                await self._claim_slots.acquire(task.domain)
            except DomainSaturated:
                return self._defer_untried(task.domain)
            # `refund_rate` has the slot not count for the domain's rate, unless the relay was tried.
            with ExitStack() as held, ExitStack() as refund_rate:
                held.callback(self._claim_slots.release, task.domain)
                refund_rate.callback(self._claim_slots.refund_rate, task.domain)
                # The relay may have gone down during the wait; one mail may still be tried.
                if not (self._pool.available or probe):
                    continue
                claim = Claim(task.id, event.epoch, record.attempt, self._owner(), message_id)
                verdict = await self._claim(claim)
                if isinstance(verdict, Taken):
                    try:
                        settled = await self._attempt(verdict, record, event, held, refund_rate)
                    except DomainSaturated:
                        return self._defer_untried(task.domain)
                    if settled is None:
                        continue
                    return self._answer(settled)
            if isinstance(verdict, Wait):
                await _wait_for_claim(verdict)
                continue
            SENDER_SKIPPED.labels("stale" if isinstance(verdict, Stale) else "stored").inc()
            if isinstance(verdict, Stale):
                return Done()
            if verdict.row.owner == claim.owner:
                _count_doubt(verdict.row, "takeover")
            return self._answer(verdict.row)

    async def _claim(self, claim: Claim) -> ClaimAnswer:
        # Asked once: its answer alone says what to give back.
        answer = asyncio.ensure_future(self._claims.claim(claim))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            self._run_cleanup(self._within(self._release_claim(answer), _CLEANUP_TIMEOUT))
            raise

    async def _attempt(
        self, taken: Taken, record: Record, event: pb.MxOk, held: ExitStack, refund_rate: ExitStack
    ) -> Delivery | None:
        """Send the claimed mail; return its settled row, or None where the claim must be asked for anew.

        `held` is what is given back when the attempt is over, `refund_rate` where it was none. Raises Crowded
        where the domain's sessions stand still; the claim is free again then.
        """
        row = taken.row._replace(reason="")
        released = row._replace(state="released")
        lease = self._leases.hold(row, taken.since)
        held.callback(self._leases.drop, lease)
        # What leaves the row to its next owner as if this one had never had it; None where nothing does.
        back: Delivery | None = released_row(taken)
        try:
            await self._publish_doubt(taken, record)
            back = released
            try:
                mail = self._composer.compose(event, row.message_id)
            except ValueError as error:
                settled = self._policy.unsendable(row, self._now_us())
                return await self._settle(settled, held, cause=str(error))
            try:
                await self._sessions.acquire(event.task.domain)
            except DomainSaturated:
                await self._claims.settle(released)
                back = None
                raise
            with ExitStack() as session:
                session.callback(self._sessions.release, event.task.domain)
                # Not before: the wait may have been long.
                expired = self._policy.expired(row, _age_start_us(event), self._now_us())
                if expired is not None:
                    return await self._settle(expired, held)
                back = None
                started = time.perf_counter()
                try:
                    ended = await self._pool.send(*mail, lease.holds)
                except SendCancelled as cancelled:
                    if cancelled.rest is None:
                        back = released
                    else:
                        refund_rate.pop_all()
                        held.push(session.pop_all())
                        rest = self._finish_handover(cancelled.rest, row, event, started)
                        self._run_cleanup(rest, held, handed_over=True)
                    raise
                SENDER_SECONDS.observe(time.perf_counter() - started)
            settled = self._outcome(row, ended, event)
            if settled.state == "released":
                back = settled
                await self._claims.settle(settled)
                return None
            refund_rate.pop_all()
            return await self._settle(settled, held, ended)
        except BaseException:
            if back is not None:
                self._run_cleanup(self._within(self._claims.settle(back), _CLEANUP_TIMEOUT))
            raise

    def domains(self) -> list[DomainUse]:
        """Return the domains that hold sessions or claims, or wait for them, worst first; on any thread."""
        sessions = {held.domain: held for held in self._sessions.held()}
        found = []
        for held in self._claim_slots.held():
            session = sessions.get(held.domain)
            used, still = (session.used, session.still) if session else (0, 0.0)
            found.append(DomainUse(held.domain, used, held.used, held.waiting, still))
        return sorted(found, key=lambda one: (-one.sessions, -one.claims, -one.waiting, one.name))

    def _outcome(self, row: Delivery, ended: replies.SendResult, event: pb.MxOk) -> Delivery:
        """Return the row to store after an attempt; released where it was none."""
        if isinstance(ended, replies.LeaseLost) or (
            isinstance(ended, replies.NotSent) and ended.spares_attempt
        ):
            return row._replace(state="released")
        return self._policy.settled(row, ended, _age_start_us(event), self._now_us(), self._rng)

    async def _publish_doubt(self, taken: Taken, record: Record) -> None:
        """Have it on record that the mail may have gone out, before it goes out again."""
        if taken.earlier is not None:
            await self._publish([event_of(taken.earlier)], record.traceparent)
        if taken.doubtful:
            await self._publish([takeover_event(taken.row, self._now_us())], record.traceparent)
            _count_doubt(taken.row, "takeover")

    async def _settle(
        self, settled: Delivery, held: ExitStack, ended: replies.SendResult | None = None, cause: str = ""
    ) -> Delivery | None:
        """Store the outcome of an attempt that `ended` so; cancelled, go on without the handler."""
        try:
            became = await self._store(settled, ended, cause)
        except asyncio.CancelledError:
            handed_over = _handed_over(ended)
            limit = self._handover if handed_over else _CLEANUP_TIMEOUT
            work = self._within(self._store(settled, ended, cause), limit)
            self._run_cleanup(self._publish_if_late(work, settled), held, handed_over)
            raise
        return settled if became is Settlement.STORED else None

    async def _store(
        self, settled: Delivery, ended: replies.SendResult | None, cause: str = ""
    ) -> Settlement:
        cause = cause or getattr(ended, "cause", "")
        became = await self._claims.settle(settled)
        if became is Settlement.STORED:
            SENDER_OUTCOMES.labels(settled.state).inc()
            if isinstance(ended, replies.InDoubt):
                _count_doubt(settled, "lost reply", cause=cause)
            elif settled.state != "sent":
                _log(settled, cause=cause)
            return became
        SENDER_FENCED.labels(became.value).inc()
        log.warning(
            "the claim was lost before its outcome was stored",
            task=str(UUID(bytes=settled.task_id)),
            outcome=settled.state,
            became=became.value,
            message_id=settled.message_id,
            reply=settled.reply,
        )
        return became

    def _defer_untried(self, domain: str) -> Outcome:
        SENDER_CROWDED.inc()
        delays = self._policy.delays
        delay, due_at_ms = schedule(delays, delays[0], self._now_us() // 1000, self._rng)
        return Retry(delay, due_at_ms, f"too many wait for {domain}", counts=False)

    def _answer(self, row: Delivery) -> Outcome:
        return answer(row, self._policy.delays, self._now_us() // 1000)

    # --- what a cancelled handler leaves ------------------------------------------------------

    def _run_cleanup(
        self, work: Coroutine[Any, Any, object], held: ExitStack | None = None, handed_over: bool = False
    ) -> None:
        """Do `work` without the handler, and give back afterwards what the handler held."""
        kept = held.pop_all() if held is not None else ExitStack()
        self.handed_over += handed_over
        task = asyncio.get_running_loop().create_task(work)
        self._cleanups.add(task)

        def over(task: asyncio.Task[object]) -> None:
            self._cleanups.discard(task)
            self.handed_over -= handed_over
            kept.close()

        task.add_done_callback(over)

    async def _finish_handover(
        self, rest: asyncio.Task[replies.SendResult], row: Delivery, event: pb.MxOk, started: float
    ) -> None:
        """Wait for the reply to a mail that was handed over, and settle its row; its next owner publishes."""
        now = asyncio.get_running_loop().time
        until = now() + self._handover
        await asyncio.wait({rest}, timeout=self._handover)
        rest.cancel()
        ended = await rest
        SENDER_SECONDS.observe(time.perf_counter() - started)
        settled = self._outcome(row, ended, event)
        released = settled.state == "released"
        work = self._claims.settle(settled) if released else self._store(settled, ended)
        await self._publish_if_late(self._within(work, max(until - now(), _CLEANUP_TIMEOUT)), settled)

    async def _within(self, work: Awaitable[R], seconds: float) -> R | None:
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            log.warning("gave up what a cancelled handler had left to store or to publish", seconds=seconds)
            return None

    async def _publish_if_late(self, storing: Awaitable[Settlement | None], settled: Delivery) -> None:
        """Store an outcome; publish it if that was late: the next owner may have published another one."""
        if await storing is not Settlement.LATE:
            return
        claim = Claim(settled.task_id, settled.epoch, settled.attempt, self._owner(), settled.message_id)
        verdict = await self._within(self._claims.claim(claim), _CLEANUP_TIMEOUT)
        if isinstance(verdict, Stored):
            await self._within(self._publish([event_of(verdict.row)], None), _CLEANUP_TIMEOUT)

    async def _release_claim(self, answer: Awaitable[ClaimAnswer]) -> None:
        """Give back a claim whose answer nobody waits for any more."""
        verdict = await answer
        if isinstance(verdict, Taken):
            await self._claims.settle(released_row(verdict))


def stage(sender: Sender, delays: Sequence[int]) -> Stage:
    """The stage as the runtime takes it: what it reads, its handler and its delays (seconds)."""
    return Stage.of(STAGES["sender"], handle=sender.handle, delays=delays, close=sender.close)


async def _wait_for_claim(wait: Wait) -> None:
    # A lease that is over and may not be taken over yet has no time left to wait for.
    await asyncio.sleep(min(wait.seconds, _CLAIM_POLL_SECONDS) or _CLAIM_POLL_SECONDS)


def _age_start_us(event: pb.MxOk) -> int:
    return max(event.task.created_at_us, event.at_us, event.epoch * 1000)


def _handed_over(ended: replies.SendResult | None) -> bool:
    return isinstance(ended, replies.Sent | replies.InDoubt) or (
        isinstance(ended, replies.Rejected) and ended.phase is replies.Phase.AFTER_DOT
    )


def _count_doubt(row: Delivery, how: str, **more: object) -> None:
    SENDER_IN_DOUBT.labels(how).inc()
    _log(row, how=how, **more)


def _log(row: Delivery, **more: object) -> None:
    log.info(
        "in doubt" if row.reason == IN_DOUBT or row.state == "sending" else f"mail {row.state}",
        task=str(UUID(bytes=row.task_id)),
        attempt=row.attempt,
        reason=row.reason,
        reply=row.reply,
        message_id=row.message_id,
        **more,
    )
