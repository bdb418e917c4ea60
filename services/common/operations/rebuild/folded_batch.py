"""A batch of events, folded in memory into the rows that a rebuild writes. Pure.

The sender settles a delivery before it publishes, so a delivery's latest event says what its row was then. No
event tells of a claim that is not settled, or of an outcome that is not published: only the row itself does.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common import fold
from services.common.database.tables import INT_MAX, deliveries, widths
from services.common.database.times import to_micros
from services.common.deliveries.decide import IN_DOUBT, NO_OWNER, RESOLVED, Delivery, DeliveryState
from services.common.deliveries.row_events import STAGE
from services.common.events import Event
from services.common.taskstore import Body, body_of
from services.common.timeline import TimelineRow, timeline_row

__all__ = ["DeliveryFacts", "FoldedBatch", "delivery_facts", "merge_facts", "restored_delivery"]

_WIDTHS = widths(deliveries)


class DeliveryFacts(NamedTuple):
    """What events say about a delivery: enough of its row that no mail is sent twice.

    `version` is the fold's version of the latest event. `doubts` is the least number of times that the
    delivery was in doubt. Times are microseconds since the Unix epoch.
    """

    task_id: bytes
    version: int
    state: DeliveryState
    epoch: int
    attempt: int
    doubts: int
    settled_at: int
    next_attempt_at: int
    reason: str
    reply: str
    relay: str
    message_id: str


class FoldedBatch:
    """What a batch of events folds to: each task's row, body and delivery facts, and all timeline entries."""

    def __init__(self) -> None:
        self.rows: dict[bytes, fold.TaskRow] = {}
        self.entries: dict[tuple[bytes, str], TimelineRow] = {}
        self.bodies: dict[bytes, Body] = {}
        self.facts: dict[bytes, DeliveryFacts] = {}

    def add(self, event: Event) -> None:
        """Fold one event. Of two events in one version the first one stays, as in the status stage."""
        row = fold.delta(event)
        id_ = row.id
        known = self.rows.get(id_)
        self.rows[id_] = row if known is None else fold.merge(known, row)
        entry = timeline_row(event)
        self.entries.setdefault((id_, entry.event_id), entry)
        if isinstance(event, pb.TaskCreated | pb.MxOk):
            if id_ not in self.bodies and (event.task.HasField("body") or event.task.HasField("html")):
                self.bodies[id_] = body_of(event.task)
            return
        facts = delivery_facts(event, row.version)
        if facts is not None:
            before = self.facts.get(id_)
            self.facts[id_] = facts if before is None else merge_facts(before, facts)

    def tasks(self) -> set[bytes]:
        """Return the ids of all tasks in this batch."""
        return {*self.rows, *(id_ for id_, _ in self.entries), *self.bodies, *self.facts}

    def without_rows(self) -> FoldedBatch:
        """Return a batch of everything but the rows. It shares its content with this one."""
        rest = FoldedBatch()
        rest.entries, rest.bodies, rest.facts = self.entries, self.bodies, self.facts
        return rest

    def rows_only(self) -> FoldedBatch:
        """Return a batch of the rows alone, to fold more events into. It shares them with this one."""
        rest = FoldedBatch()
        rest.rows = self.rows
        return rest

    def halves(self) -> tuple[FoldedBatch, FoldedBatch]:
        """Return this batch in two parts with about as many tasks each."""
        tasks = self.tasks()
        first = frozenset(islice(tasks, len(tasks) // 2))
        return self._part(lambda id_: id_ in first), self._part(lambda id_: id_ not in first)

    def _part(self, belongs: Callable[[bytes], bool]) -> FoldedBatch:
        part = FoldedBatch()
        part.rows = {id_: row for id_, row in self.rows.items() if belongs(id_)}
        part.entries = {key: entry for key, entry in self.entries.items() if belongs(key[0])}
        part.bodies = {id_: body for id_, body in self.bodies.items() if belongs(id_)}
        part.facts = {id_: facts for id_, facts in self.facts.items() if belongs(id_)}
        return part


def delivery_facts(event: Event, version: int) -> DeliveryFacts | None:
    """Return what an event says about its task's delivery, None where it says nothing.

    `version` is the event's version in the fold. Texts are cut to their columns' widths.
    """
    match event:
        case pb.MailSent():
            facts = _facts(event, version, "sent")
            return facts._replace(reason=RESOLVED if event.resolved else "")
        case pb.MailFailed():
            facts = _facts(event, version, "uncertain" if event.uncertain else "failed")
            # The event does not count earlier doubts. That there was one is what matters.
            return facts._replace(doubts=int(event.uncertain))
        case pb.MailDeferred() if event.stage == STAGE:
            facts = _facts(event, version, "deferred")
            if event.in_doubt:
                facts = facts._replace(doubts=min(event.takeover, INT_MAX - 1) + 1)
            if event.in_doubt and not event.next_attempt_at_us:
                # The sender that took the claim over published this before it sent the mail again.
                return facts._replace(state="sending", settled_at=0, reason="", reply="", relay="")
            return facts._replace(next_attempt_at=event.next_attempt_at_us)
        case pb.TaskCancelled():
            attempts = min(event.attempts, INT_MAX)
            # A cancellation that closes an uncertain task settles it, and tells of a doubt.
            reason = IN_DOUBT if event.in_doubt else ""
            doubts = int(event.in_doubt)
            return DeliveryFacts(
                event.id, version, "cancelled", event.epoch, attempts, doubts, 0, 0, reason, "", "", ""
            )
        case pb.MxFailed():
            # services/common/deliveries/mx_failures.py writes the same row.
            reason = event.reason[: _WIDTHS["reason"]]
            return DeliveryFacts(
                event.id, version, "failed", event.epoch, 0, 0, event.at_us, 0, reason, "", "", ""
            )
    return None


def _facts(
    event: pb.MailSent | pb.MailFailed | pb.MailDeferred, version: int, state: DeliveryState
) -> DeliveryFacts:
    return DeliveryFacts(
        event.id,
        version,
        state,
        event.epoch,
        min(event.attempt, INT_MAX),
        0,
        event.at_us,
        0,
        getattr(event, "reason", "")[: _WIDTHS["reason"]],
        event.reply[: _WIDTHS["reply"]],
        event.relay[: _WIDTHS["relay"]],
        event.message_id[: _WIDTHS["message_id"]],
    )


def merge_facts(a: DeliveryFacts, b: DeliveryFacts) -> DeliveryFacts:
    """Return what two events of one task say together.

    The later one decides. The doubts are the larger number, and a Message-ID stays once it is known.
    """
    late, early = (b, a) if b.version > a.version else (a, b)
    return late._replace(doubts=max(a.doubts, b.doubts), message_id=late.message_id or early.message_id)


def restored_delivery(facts: DeliveryFacts, now: datetime) -> Delivery:
    """Return the delivery that these facts describe.

    `now` is the database's time, naive UTC. A claim that was held ends then. As in `decide`, a cancelled
    delivery that was ever in doubt becomes uncertain, unless it was uncertain before its cancellation.
    """
    state, reason, settled_at, doubts = facts.state, facts.reason, facts.settled_at, facts.doubts
    if state == "deferred" and reason == IN_DOUBT:
        # The delivery counts the doubts before this attempt, not the attempt's own.
        doubts -= 1
    elif state == "cancelled" and reason == IN_DOUBT:
        reason = ""
    elif state == "cancelled" and doubts:
        state, reason = "uncertain", IN_DOUBT
        settled_at = to_micros(now)
    return Delivery(
        facts.task_id,
        state,
        facts.epoch,
        facts.attempt,
        doubts,
        NO_OWNER,
        now,
        settled_at,
        facts.next_attempt_at,
        reason,
        facts.reply,
        facts.relay,
        facts.message_id,
        # The events count the doubts of all epochs. Too few resends do less harm than too many.
        doubts,
    )
