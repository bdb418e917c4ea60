"""The sender stage: it reads tasks whose domain takes mail, and publishes what became of each mail.

An attempt claims the task, sends the mail and settles the delivery (attempts.py). Then the runtime publishes
the event and commits the offset.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import Cancel, Stale, Wait
from services.common.stage.types import Done, Finish, Outcome, Record, Stage
from services.common.stages import STAGES
from services.sender.async_claims import AsyncClaims
from services.sender.attempts import Attempts, poll_seconds
from services.sender.cancelled import Pool, Publish
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.policy import Policy
from services.sender.slots import Slots

__all__ = ["DomainUse", "Sender", "stage"]


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


class Sender:
    """Handles the records of `mx.ok` and `task.cancelled`. Belongs to one event loop.

    `claim_slots` bounds the mails that are claimed and not settled, `session_slots` the mails that the pool
    sends. `owner` returns a new owner token at each call. `now_us` returns microseconds since the Unix epoch.
    `handover` is how long (seconds) a handed-over mail may go on after its record was cancelled.
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
        self._claims, self._owner = claims, owner
        self._attempts = Attempts(
            claims=claims,
            leases=leases,
            pool=pool,
            composer=composer,
            policy=policy,
            claim_slots=claim_slots,
            session_slots=session_slots,
            publish=publish,
            owner=owner,
            handover=handover,
            now_us=now_us,
            rng=rng or random.Random(),
        )
        self._cancellations: dict[Record, asyncio.Task[None]] = {}

    @property
    def handed_over(self) -> int:
        """Handed-over mails whose records were cancelled and whose outcomes are not stored yet."""
        return self._attempts.cancelled.handed_over

    def start(self, records: Sequence[Record], finish: Finish) -> None:
        """Begin to handle records; `finish` takes their outcomes. Does not block."""
        mails = []
        for record in records:
            if isinstance(record.event, pb.TaskCancelled):
                handling = self._handle_cancelled(record, record.event, finish)
                self._cancellations[record] = asyncio.get_running_loop().create_task(handling)
            else:
                mails.append(record)
        self._attempts.start(mails, finish)

    def cancel(self, records: Sequence[Record]) -> None:
        """Handle these records no longer, and release their claims. Does not block.

        Where a mail was handed over, the sender still waits for the server's reply and settles the delivery.
        The partition's next owner then publishes the event.
        """
        for record in records:
            handling = self._cancellations.pop(record, None)
            if handling is None:
                self._attempts.cancel(record)
            else:
                handling.cancel()

    async def close(self) -> None:
        """Wait until the cleanups of cancelled records have ended.

        That takes seconds, or up to `handover` where a handed-over mail has no reply yet.
        """
        await self._attempts.cancelled.close()

    def domains(self) -> list[DomainUse]:
        """Return the domains that use or wait for sessions or claims, worst first. Safe on any thread."""
        sessions = {use.domain: use for use in self._attempts.session_slots.usage()}
        found = []
        for use in self._attempts.claim_slots.usage():
            session = sessions.get(use.domain)
            used, still = (session.used, session.unchanged_seconds) if session else (0, 0.0)
            found.append(DomainUse(use.domain, used, use.used, use.waiting, still))
        return sorted(found, key=lambda use: (-use.sessions, -use.claims, -use.waiting, use.name))

    async def _handle_cancelled(self, record: Record, event: pb.TaskCancelled, finish: Finish) -> None:
        outcome: Outcome | Exception
        try:
            outcome = await self._outcome_of_cancel(event)
        except Exception as error:
            outcome = error
        self._cancellations.pop(record, None)
        finish([(record, outcome)])

    async def _outcome_of_cancel(self, event: pb.TaskCancelled) -> Outcome:
        while True:
            answer = await self._claims.claim(Cancel(event.id, event.epoch, self._owner()))
            if isinstance(answer, Wait):
                await asyncio.sleep(poll_seconds(answer))
                continue
            if isinstance(answer, Stale):
                return Done()
            return self._attempts.outcome_of_record(answer.row)


def stage(sender: Sender, delays: Sequence[int]) -> Stage:
    """Return the sender's stage for the runtime; `delays` are in seconds."""
    return Stage.of(STAGES["sender"], handle_all=sender, delays=delays, close=sender.close)
