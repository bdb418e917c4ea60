"""One attempt of a sender: the record of `mx.ok`, how far it is, and what it holds of the sender."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Any, Protocol, cast

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import Claim, Delivery
from services.common.stage.types import Record
from services.sender.leases import Lease, Leases
from services.sender.slots import Slots

__all__ = ["Attempt", "Step", "Waiting"]


class Waiting(Protocol):
    """What an attempt waits for, and can stop waiting for."""

    def cancel(self) -> object: ...


class Step(Enum):
    """What an attempt waits for."""

    TURN = "turn"
    """The relay, a slot, another owner's claim, or the publishing of a doubt: `waiting_for` ends the wait."""
    CLAIM = "claim"
    """The answer to its claim."""
    SEND = "send"
    """The result of its mail."""
    STORE = "store"
    """The database, which stores its outcome or releases its claim."""


class Attempt:
    """One record's attempt.

    It holds at most a claim slot, a lease and a session slot, which `release` returns.
    """

    __slots__ = (
        "_claim_slots",
        "_leases",
        "_session_slots",
        "cancelled",
        "claim",
        "domain",
        "event",
        "handed_over",
        "has_claim_slot",
        "has_session",
        "lease",
        "mail",
        "probe",
        "record",
        "row",
        "started",
        "step",
        "tried",
        "undo",
        "waiting_for",
    )

    def __init__(self, record: Record, claim_slots: Slots, session_slots: Slots, leases: Leases) -> None:
        self.record = record
        self.event = cast(pb.MxOk, record.event)
        self.domain = self.event.task.domain
        self._claim_slots, self._session_slots, self._leases = claim_slots, session_slots, leases
        self.has_claim_slot = self.has_session = False
        self.step = Step.TURN
        self.waiting_for: Waiting | None = None
        self.probe = False
        """Whether it may be claimed although the relay is down: one mail shows whether that is over."""
        self.claim: Claim | None = None
        self.row: Delivery | None = None
        """Its claimed row, without the reason that a claim in doubt adds."""
        self.undo: Delivery | None = None
        """The row to store if it is cancelled now, so that the next claim starts as this one did."""
        self.lease: Lease | None = None
        self.mail: Any = None
        self.started = 0.0
        self.tried = False
        """Whether the relay was tried: otherwise the slot does not count for the domain's rate."""
        self.handed_over = False
        """Whether the relay may have the mail, and its outcome is not stored yet."""
        self.cancelled: asyncio.Future[Any] | None = None
        """Once it is cancelled while it waits for a call: the call's result."""

    def release_session(self) -> None:
        """Return the session slot, if any."""
        if self.has_session:
            self.has_session = False
            self._session_slots.release(self.domain)

    def release(self) -> None:
        """Return all that it holds."""
        self.release_session()
        if self.lease is not None:
            self._leases.drop(self.lease)
            self.lease = None
        if self.has_claim_slot:
            self.has_claim_slot = False
            if not self.tried:
                self._claim_slots.refund_rate(self.domain)
            self._claim_slots.release(self.domain)
