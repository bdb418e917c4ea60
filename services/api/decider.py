"""Cancel, Retry and Resolve: a worker thread decides in a transaction, then the api publishes the event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_result, wait_exponential

from postroad.v1 import task_pb2
from services.api import cancelling, resolving, retrying
from services.api.database_threads import DatabaseThreads
from services.api.errors import being_sent, body_purged, not_found, not_retryable, not_uncertain
from services.api.outbox import ApiEvent, OutboxEvent
from services.api.uuid7 import text
from services.common.deliveries.decide import Wait
from services.common.deliveries.rows import owner_tokens

__all__ = ["Decider"]

# A sender settles most mails within tens of milliseconds.
_BACKOFF = wait_exponential(multiplier=0.03, max=0.25)
_CANCEL_TIMEOUT = 4.0
"""Seconds that a Cancel waits while a sender has the mail."""


class Decider:
    """Cancels, retries and resolves tasks. Belongs to one event loop.

    `threads` runs the transactions. These may wait for other transactions' locks, so Get and List use other
    threads. `publish` gets each committed event and must not block. An event that it never gets, because the
    caller has left meanwhile, stays in the outbox.
    """

    def __init__(
        self,
        threads: DatabaseThreads,
        publish: Callable[[Sequence[OutboxEvent[ApiEvent]]], None],
    ) -> None:
        self._threads, self._publish = threads, publish
        self._next_owner = owner_tokens()

    async def cancel(self, tenant: str, id_: bytes, traceparent: bytes) -> task_pb2.Task:
        """Return the task after the decision.

        Raises StatusError: NOT_FOUND; UNAVAILABLE where a sender has the mail for more than 4 s, or where the
        database does not answer.
        """
        deadline = time.monotonic() + _CANCEL_TIMEOUT

        def out_of_time(state: RetryCallState) -> bool:
            return time.monotonic() + state.upcoming_sleep > deadline

        attempts = AsyncRetrying(
            retry=retry_if_result(_must_wait), wait=_pause, stop=out_of_time, sleep=asyncio.sleep
        )
        try:
            answer: cancelling.Cancelled = await attempts(self._try_cancel, tenant, id_)
        except RetryError:
            raise being_sent(text(id_)) from None
        if answer.event is not None:
            self._publish([OutboxEvent(answer.event, traceparent)])
        return answer.task

    async def retry(self, tenant: str, id_: bytes, traceparent: bytes) -> task_pb2.Task:
        """Return the task, which is pending again. A `send_at` in the future still holds.

        Raises StatusError: NOT_FOUND; FAILED_PRECONDITION where the task is completed, in progress or without
        its body; UNAVAILABLE where the database does not answer.
        """
        now_ms, tried_epoch = time.time_ns() // 1_000_000, 0

        def work(connection: Connection) -> retrying.Retried | retrying.NotRetryable | None:
            nonlocal tried_epoch
            answer = retrying.retry(connection, tenant, id_, now_ms, tried_epoch)
            if isinstance(answer, retrying.Retried):
                tried_epoch = answer.event.epoch
            return answer

        answer = await self._threads.run(work)
        if answer is None:
            raise not_found(text(id_))
        if isinstance(answer, retrying.NotRetryable):
            refuse = body_purged if answer.purged else not_retryable
            raise refuse(text(id_), answer.status)
        # A sweeper publishes a scheduled event when it is due.
        if not answer.event.send_at_us:
            self._publish([OutboxEvent(answer.event, traceparent, answer.event.ByteSize())])
        return answer.task

    async def resolve(self, tenant: str, id_: bytes, sent: bool, traceparent: bytes) -> task_pb2.Task:
        """Return the task, which is completed (`sent`) or failed.

        Raises StatusError: NOT_FOUND; FAILED_PRECONDITION where the task is not uncertain; UNAVAILABLE where
        the database does not answer.
        """
        owner, now_us = self._next_owner(), time.time_ns() // 1000
        answer = await self._threads.run(
            lambda connection: resolving.resolve(
                connection, tenant, id_, sent=sent, owner=owner, now_us=now_us
            )
        )
        if answer is None:
            raise not_found(text(id_))
        if isinstance(answer, resolving.NotResolvable):
            raise not_uncertain(text(id_), answer.status)
        if answer.event is not None:
            self._publish([OutboxEvent(answer.event, traceparent)])
        return answer.task

    async def _try_cancel(self, tenant: str, id_: bytes) -> cancelling.Cancelled | Wait:
        owner, now_us = self._next_owner(), time.time_ns() // 1000
        answer = await self._threads.run(
            lambda connection: cancelling.cancel(connection, tenant, id_, owner, now_us)
        )
        if answer is None:
            raise not_found(text(id_))
        return answer


def _must_wait(answer: cancelling.Cancelled | Wait) -> bool:
    return isinstance(answer, Wait)


def _pause(state: RetryCallState) -> float:
    """Return the seconds until the next try: the backoff, or less where the sender's claim ends sooner."""
    assert state.outcome is not None
    answer: Wait = state.outcome.result()
    return min(_BACKOFF(state), answer.seconds)
