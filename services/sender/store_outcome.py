"""Storing the outcome of an attempt, with its log lines and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

import structlog

from services.common.deliveries.decide import IN_DOUBT, Delivery
from services.common.deliveries.settlement import Settlement
from services.sender.async_claims import AsyncClaims
from services.sender.masking import reply_codes, without_addresses
from services.sender.metrics import SENDER_FENCED, SENDER_IN_DOUBT, SENDER_OUTCOMES
from services.sender.replies import InDoubt, SendResult

__all__ = ["log_doubt", "note_outcomes", "store_outcome"]

log = structlog.get_logger(__name__)


_SENT = SENDER_OUTCOMES.labels("sent")


async def store_outcome(
    claims: AsyncClaims, new_row: Delivery, result: SendResult | None = None
) -> Settlement:
    """Store `new_row` in the delivery; return what became of it.

    Waits while the database is away. `result` is how the attempt ended, None where nothing was sent.
    """
    settlement = await claims.store(new_row)
    _note(new_row, settlement, result)
    return settlement


class StoredRow(Protocol):
    """A row that was stored: how the attempt ended, and the cause of an outcome without a result."""

    @property
    def new_row(self) -> Delivery: ...

    @property
    def result(self) -> SendResult | None: ...

    @property
    def cause(self) -> str: ...


def note_outcomes(rows: Sequence[StoredRow], settlements: Sequence[Settlement | Exception]) -> None:
    """Count and log what became of the rows that were stored in one call. A released row is no outcome."""
    sent = 0
    for row, settlement in zip(rows, settlements, strict=True):
        state = row.new_row.state
        if settlement is Settlement.STORED and state == "sent":
            sent += 1
        elif isinstance(settlement, Settlement) and state != "released":
            _note(row.new_row, settlement, row.result, row.cause)
    if sent:
        _SENT.inc(sent)


def _note(new_row: Delivery, settlement: Settlement, result: SendResult | None, cause: str = "") -> None:
    if settlement is Settlement.STORED:
        SENDER_OUTCOMES.labels(new_row.state).inc()
        cause = without_addresses(cause or getattr(result, "cause", ""))
        if isinstance(result, InDoubt):
            log_doubt(new_row, "lost reply", cause=cause)
        elif new_row.state != "sent":
            _log(new_row, cause=cause)
        return
    SENDER_FENCED.labels(settlement.value).inc()
    log.warning(
        "the claim was lost before its outcome was stored",
        task=str(UUID(bytes=new_row.task_id)),
        outcome=new_row.state,
        became=settlement.value,
        message_id=new_row.message_id,
        reply=reply_codes(new_row.reply),
    )


def log_doubt(row: Delivery, how: str, **more: object) -> None:
    """Count and log a mail that may have gone out; `how` is "takeover" or "lost reply"."""
    SENDER_IN_DOUBT.labels(how).inc()
    _log(row, how=how, **more)


def _log(row: Delivery, **more: object) -> None:
    log.info(
        "in doubt" if row.reason == IN_DOUBT or row.state == "sending" else f"mail {row.state}",
        task=str(UUID(bytes=row.task_id)),
        attempt=row.attempt,
        reason=row.reason,
        reply=reply_codes(row.reply),
        message_id=row.message_id,
        **more,
    )
