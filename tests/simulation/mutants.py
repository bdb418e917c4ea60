"""Mutants: each breaks the code in one way, and the simulation must find a violation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from services.api import cancelling, outbox
from services.api.outbox import NewTask, OutboxRow, created
from services.api.outbox_publisher import OutboxPublisher
from services.common import fold
from services.common.deliveries import settlement as fence
from services.common.deliveries.decide import Claim, Delivery, Taken, initial_row
from services.common.deliveries.settlement import Settlement
from services.common.stage.handler_runner import HandlerRunner
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.offset_tracker import OffsetTracker
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.types import Dead
from services.sender.async_claims import AsyncClaims
from services.sender.attempt import Attempt
from services.sender.cancelled import CancelledAttempts
from tests.simulation.database import Database
from tests.simulation.patches import replaced
from tests.simulation.threads import VirtualTime

__all__ = ["MUTANTS", "applied"]

Patches = list[tuple[Any, str, Any]]


def _commit_before_send() -> Patches:
    """Commit a record as soon as it is fetched."""

    def add(self: OffsetTracker, record: object, offset: int) -> None:
        self._next = max(self._next or 0, offset + 1)

    return [(OffsetTracker, "add", add)]


def _no_claim() -> Patches:
    """Send without a claim."""

    original = AsyncClaims.claim_all

    async def claim_all(self: AsyncClaims, requests: Sequence[Any]) -> list[Any]:
        if not all(isinstance(request, Claim) for request in requests):
            return await original(self, requests)
        await asyncio.sleep(0)
        since = VirtualTime.monotonic()
        return [Taken(initial_row(request, datetime.min), since=since) for request in requests]

    async def store_all(self: AsyncClaims, new_rows: Sequence[Delivery]) -> list[Settlement]:
        await asyncio.sleep(0)
        return [Settlement.STORED] * len(new_rows)

    return [(AsyncClaims, "claim_all", claim_all), (AsyncClaims, "store_all", store_all)]


def _no_fencing_on_settle() -> Patches:
    """Store a settle even when another sender owns the claim."""

    def settlement(row: Delivery | None, settled: Delivery) -> tuple[Settlement, Delivery | None]:
        return Settlement.STORED, settled

    return [(fence, "settlement", settlement)]


def _stale_completion_counts() -> Patches:
    """Let a completion from before a revocation finish the same offset fetched again."""

    def release(self: PartitionTracker, records: Sequence[InFlightRecord]) -> None:
        for record in records:
            self.in_flight.remove(record.size)
            if not record.finished:
                continue
            place = record.assignment.topic, record.assignment.partition
            assignment = self._live.get(place)
            if assignment is not None:
                unfinished = assignment.offsets._unfinished
                for same in [other for other, offset in unfinished.items() if offset == record.offset]:
                    assignment.offsets.finish(same)

    return [(PartitionTracker, "release", release)]


def _cuts_off_what_was_handed_over() -> Patches:
    """Let a cancellation end the SMTP exchange, even after the handover."""

    original = CancelledAttempts._finish_handover

    async def finish(self: CancelledAttempts, attempt: Attempt) -> None:
        self._pool.cut_off(attempt.mail)
        await original(self, attempt)

    return [(CancelledAttempts, "_finish_handover", finish)]


def _takes_over_at_once() -> Patches:
    """Allow a takeover as soon as the database is back, before the owner can store its outcome."""

    original = AsyncClaims.__init__

    def init(self: AsyncClaims, claims: Any) -> None:
        original(self, claims, owners_first=0)

    return [(AsyncClaims, "__init__", init)]


def _counts_offsets() -> Patches:
    """Count records to get the next offset, as if offsets had no gaps."""

    def add(self: OffsetTracker, record: object, offset: int) -> None:
        self._unfinished[record] = offset
        self._next = offset + 1 if self._next is None else self._next + 1

    return [(OffsetTracker, "add", add)]


def _outbox_before_ack() -> Patches:
    """Delete an outbox row before Kafka acks its event."""

    original = OutboxPublisher.publish

    def publish(self: OutboxPublisher, committed: Sequence[NewTask]) -> None:
        rows = [created(new_task.event.task.id) for new_task in committed]
        task = asyncio.get_running_loop().create_task(self._deleter.many(rows))
        task.add_done_callback(lambda _: original(self, committed))

    return [(OutboxPublisher, "publish", publish)]


def _scheduled_at_once() -> Patches:
    """Make scheduled events due at once."""

    def insert_scheduled(connection: Database, rows: Sequence[tuple[OutboxRow, datetime]]) -> None:
        connection.put([row for row, _ in rows], 0)

    return [(outbox, "insert_scheduled", insert_scheduled)]


def _cancel_without_claim() -> Patches:
    """Record and publish a Cancel, but do not store it in the delivery."""

    return [(cancelling, "insert_row", lambda *_: True), (cancelling, "store_rows", lambda *_: None)]


def _dead_letter_failure_ignored() -> Patches:
    """Finish a record although its dead letter was not published."""

    original = HandlerRunner._on_published

    def on_published(self: HandlerRunner, outcomes: Any, outgoing: Any, owners: Any, failures: Any) -> None:
        kept = [f for f in failures if not isinstance(outcomes[owners[f[0]]], Dead)]
        original(self, outcomes, outgoing, owners, kept)

    return [(HandlerRunner, "_on_published", on_published)]


def _fold_ignores_epochs() -> Patches:
    """Fold a reopened task as if all its events had one epoch."""

    return [(fold, "_version", partial(_without_epoch, fold._version))]


def _without_epoch(original: Callable[..., int], epoch: int, *arguments: int, **named: int) -> int:
    return original(0, *arguments, **named)


MUTANTS: dict[str, Callable[[], Patches]] = {
    "commit-before-send": _commit_before_send,
    "no-claim": _no_claim,
    "no-fencing-on-settle": _no_fencing_on_settle,
    "stale-completion-counts": _stale_completion_counts,
    "cuts-off-what-was-handed-over": _cuts_off_what_was_handed_over,
    "takes-over-at-once": _takes_over_at_once,
    "counts-offsets": _counts_offsets,
    "outbox-before-ack": _outbox_before_ack,
    "scheduled-at-once": _scheduled_at_once,
    "cancel-without-claim": _cancel_without_claim,
    "dead-letter-failure-ignored": _dead_letter_failure_ignored,
    "fold-ignores-epochs": _fold_ignores_epochs,
}


@contextlib.contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Apply the mutant of this name within the block; None for none."""
    with replaced(MUTANTS[name]() if name else []):
        yield
