"""Storing the outcome of an attempt, with its log lines and metrics."""

from __future__ import annotations

from uuid import UUID

import structlog

from services.common.deliveries.decide import IN_DOUBT, Delivery
from services.common.deliveries.settlement import Settlement
from services.sender.async_claims import AsyncClaims
from services.sender.metrics import SENDER_FENCED, SENDER_IN_DOUBT, SENDER_OUTCOMES
from services.sender.replies import InDoubt, SendResult

__all__ = ["log_doubt", "store_outcome"]

log = structlog.get_logger(__name__)


async def store_outcome(
    claims: AsyncClaims, new_row: Delivery, result: SendResult | None = None, cause: str = ""
) -> Settlement:
    """Store `new_row` in the delivery; return what became of it.

    Waits while the database is away. `result` is how the attempt ended, None where nothing was sent.
    `cause` is for the log; the result's own cause is taken where it is empty.
    """
    cause = cause or getattr(result, "cause", "")
    settlement = await claims.store(new_row)
    if settlement is Settlement.STORED:
        SENDER_OUTCOMES.labels(new_row.state).inc()
        if isinstance(result, InDoubt):
            log_doubt(new_row, "lost reply", cause=cause)
        elif new_row.state != "sent":
            _log(new_row, cause=cause)
        return settlement
    SENDER_FENCED.labels(settlement.value).inc()
    log.warning(
        "the claim was lost before its outcome was stored",
        task=str(UUID(bytes=new_row.task_id)),
        outcome=new_row.state,
        became=settlement.value,
        message_id=new_row.message_id,
        reply=new_row.reply,
    )
    return settlement


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
        reply=row.reply,
        message_id=row.message_id,
        **more,
    )
