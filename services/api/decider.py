"""Cancel, Retry and Resolve: asked of the database on worker threads, their decisions published at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import cancelling, reopening, resolving
from services.api.errors import being_sent, body_purged, not_found, not_open_to_retry, not_uncertain
from services.api.outbox import Decided
from services.api.reader import Reader
from services.api.relay import Recording
from services.api.uuid7 import text
from services.common.deliveries.decide import Wait
from services.common.deliveries.rows import owner_tokens

__all__ = ["Decider"]

# A mail under way is settled after some tens of milliseconds, as a rule.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.03, 0.25
_PATIENCE = 4.0
"""Seconds that a Cancel waits for a mail under way."""


class Decider:
    """Cancels, reopens and resolves tasks. Belongs to one event loop.

    `threads` runs the transactions; they hold locks for milliseconds, but may wait for those of others, so it
    is not the one that Get and List wait for. `publish` takes what was committed; it does not block, and what
    it is not told (the caller has gone meanwhile) stands in the outbox.
    """

    def __init__(
        self,
        threads: Reader,
        publish: Callable[[Sequence[Recording[Decided]]], None],
    ) -> None:
        self._threads, self._publish = threads, publish
        self._owner = owner_tokens()

    async def cancel(self, tenant: str, id_: bytes, traceparent: bytes) -> task_pb2.Task:
        """Return the task as it stands after the decision.

        Raises Problem: NOT_FOUND; UNAVAILABLE where its mail is being sent for longer than a caller may be
        kept waiting, or where the database does not answer.
        """
        end = time.monotonic() + _PATIENCE
        pause = _FIRST_PAUSE
        while True:
            owner, now_us = self._owner(), time.time_ns() // 1000
            answer = await self._threads.read(
                lambda connection: cancelling.cancel(connection, tenant, id_, owner, now_us)  # noqa: B023
            )
            if answer is None:
                raise not_found(text(id_))
            if not isinstance(answer, Wait):
                break
            wait = min(pause, answer.seconds)
            if time.monotonic() + wait > end:
                raise being_sent(text(id_))
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if answer.event is not None:
            self._publish([Recording(answer.event, traceparent)])
        return answer.task

    async def retry(self, tenant: str, id_: bytes, traceparent: bytes) -> task_pb2.Task:
        """Return the task, which is pending again, until its `send_at` where that has not come yet.

        Raises Problem: NOT_FOUND, FAILED_PRECONDITION where it is completed, under way or without its body,
        UNAVAILABLE where the database does not answer.
        """
        now_ms, tried = time.time_ns() // 1_000_000, 0

        def reopen(connection: Connection) -> reopening.Reopened | reopening.Refusal | None:
            nonlocal tried
            answer = reopening.reopen(connection, tenant, id_, now_ms, tried)
            if isinstance(answer, reopening.Reopened):
                tried = answer.event.epoch
            return answer

        answer = await self._threads.read(reopen)
        if answer is None:
            raise not_found(text(id_))
        if isinstance(answer, reopening.Refusal):
            refuse = body_purged if answer.purged else not_open_to_retry
            raise refuse(text(id_), answer.status)
        # What is scheduled, a sweeper publishes at its time.
        if not answer.event.send_at_us:
            self._publish([Recording(answer.event, traceparent, answer.event.ByteSize())])
        return answer.task

    async def resolve(self, tenant: str, id_: bytes, sent: bool, traceparent: bytes) -> task_pb2.Task:
        """Return the task, which is completed (`sent`) or failed.

        Raises Problem: NOT_FOUND, FAILED_PRECONDITION where it is not uncertain, UNAVAILABLE where the
        database does not answer.
        """
        owner, now_us = self._owner(), time.time_ns() // 1000
        answer = await self._threads.read(
            lambda connection: resolving.resolve(
                connection, tenant, id_, sent=sent, owner=owner, now_us=now_us
            )
        )
        if answer is None:
            raise not_found(text(id_))
        if isinstance(answer, resolving.Unresolved):
            raise not_uncertain(text(id_), answer.status)
        if answer.event is not None:
            self._publish([Recording(answer.event, traceparent)])
        return answer.task
