"""The rebuild's pure parts: delivery facts and folded batches."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from functools import reduce

from hypothesis import given, settings
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import (
    IN_DOUBT,
    NO_OWNER,
    NOT_SENT,
    Cancel,
    Claim,
    Delivery,
    Settled,
    Taken,
    decide,
)
from services.common.deliveries.mx_failures import failed_row
from services.common.deliveries.row_events import event_of
from services.common.deliveries.settlement import Settlement, settlement
from services.common.events import Event, event_key
from services.common.fold import delta, fold
from services.common.operations.rebuild.folded_batch import (
    DeliveryFacts,
    FoldedBatch,
    delivery_facts,
    merge_facts,
    restored_delivery,
)
from services.sender.outcome_of_record import takeover_event
from tests.event_strategies import events_of, mail_task
from tests.forms import by_form

ID = bytes(range(16))
LEASE = timedelta(seconds=20)
START = datetime(2026, 3, 1)


def known_facts(events: list[Event]) -> DeliveryFacts | None:
    each = [one for event in events if (one := delivery_facts(event, delta(event).version)) is not None]
    return reduce(merge_facts, each) if each else None


class Deliveries:
    """One task's delivery under the real rules, and the events that a sender publishes of it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.now, self.owners = rng, START, 0
        self.row: Delivery | None = None
        self.events: list[Event] = []
        self.epoch, self.attempt = 0, 1
        self.hold = rng.random() < 0.3

    def owner(self) -> bytes:
        self.owners += 1
        return self.owners.to_bytes(16)

    def now_us(self) -> int:
        return (self.now - datetime(1970, 1, 1)) // timedelta(microseconds=1)

    def step(self) -> None:
        self.now += timedelta(seconds=self.rng.choice([1, 30]))
        roll = self.rng.random()
        if roll < 0.12:
            self.epoch += 1
            self.events.append(pb.TaskCancelled(id=ID, epoch=self.epoch, at_us=self.now_us()))
            self.take(Cancel(ID, self.epoch, self.owner()))
        elif roll < 0.2:
            self.epoch, self.attempt = self.epoch + 1, 1
        else:
            self.take(Claim(ID, self.epoch, self.attempt, self.owner(), "<id@a.test>"))

    def take(self, request: Claim | Cancel) -> None:
        answer, new = decide(self.row, request, self.now, LEASE, self.hold)
        self.row = new or self.row
        if isinstance(answer, Settled) and answer.row.state != "cancelled":
            self.events.append(event_of(answer.row))
        if not isinstance(answer, Taken):
            return
        if answer.earlier is not None:
            self.events.append(event_of(answer.earlier))
        if answer.doubtful:
            self.events.append(takeover_event(answer.row, self.now_us()))
        self.send(answer.row._replace(reason=""))

    def send(self, row: Delivery) -> None:
        how = self.rng.choice(["sent", "failed", "deferred", "deferred", "doubt", "died"])
        if how == "died":
            self.now += 2 * LEASE
            return
        row = row._replace(state=how, settled_at=self.now_us(), relay="relay")  # type: ignore[arg-type]
        if how in ("deferred", "doubt"):
            row = row._replace(state="deferred", reason=how, next_attempt_at=self.now_us() + 60_000_000)
        if how == "doubt":
            row = row._replace(reason=IN_DOUBT)
            if self.hold:
                row = row._replace(state="uncertain", next_attempt_at=0)
        became, new = settlement(self.row, row)
        assert became is Settlement.STORED
        self.row = new
        self.events.append(event_of(row))
        self.attempt = row.attempt + 1


@settings(max_examples=by_form(200, 1000))
@given(st.integers(0, 1 << 32))
def test_the_events_restore_a_settled_delivery(seed: int) -> None:
    rng = random.Random(seed)
    deliveries = Deliveries(rng)
    for _ in range(rng.randrange(1, 12)):
        deliveries.step()
    row, events = deliveries.row, deliveries.events
    rng.shuffle(events)
    facts = known_facts(events + events[: len(events) // 2])
    if row is None or facts is None:
        return
    made = restored_delivery(facts, START)
    # A restored row never lets a mail be sent again that the original row would hold back.
    if row.state == "sending" or made.state == "sending":
        assert (made.state == "sent") <= (row.state == "sent")
        return
    assert (made.state, made.epoch) == (row.state, row.epoch)
    # A mail that may have gone out never counts as one that did not.
    assert bool(made.doubts_in_all or made.reason == IN_DOUBT) == bool(
        row.doubts_in_all or row.reason == IN_DOUBT
    )
    if row.state not in ("cancelled", "uncertain"):
        assert made[7:13] == row[7:13]
        assert made.doubts_in_epoch >= row.doubts_in_epoch, "no more resends than there were"
        if not any(isinstance(event, pb.MailFailed) and event.uncertain for event in events):
            assert made.doubts_in_all == row.doubts_in_all


def test_a_takeover_without_an_outcome_is_in_doubt_again() -> None:
    event = pb.MailDeferred(
        id=ID,
        epoch=3,
        attempt=2,
        stage="sender",
        reason=IN_DOUBT,
        in_doubt=True,
        takeover=1,
        message_id="<m>",
    )
    facts = known_facts([event])
    assert facts is not None
    row = restored_delivery(facts, START)
    assert (row.state, row.owner, row.doubts_in_all, row.lease_until) == ("sending", NO_OWNER, 2, START)
    answer, _ = decide(row, Claim(ID, 3, 2, b"x" * 16, "<m>"), START, LEASE, hold=False, max_resends=3)
    assert isinstance(answer, Taken)
    assert answer.doubtful
    answer, _ = decide(row, Claim(ID, 3, 2, b"x" * 16, "<m>"), START, LEASE, hold=True)
    assert isinstance(answer, Settled)
    assert answer.row.state == "uncertain"


def test_a_failed_domain_restores_the_row_of_the_status_stage() -> None:
    event = pb.MxFailed(id=mail_task(0).id, epoch=3, attempt=2, reason="null_mx" * 20, detail="d", at_us=7)
    facts = delivery_facts(event, 1)
    assert facts is not None
    assert restored_delivery(facts, START)._replace(lease_until=failed_row(event).lease_until) == failed_row(
        event
    )


def test_a_resolved_delivery_is_restored_so_that_nothing_is_sent() -> None:
    doubt = pb.MailFailed(id=ID, attempt=2, reason=IN_DOUBT, uncertain=True, message_id="<m>", at_us=5)
    closed = pb.TaskCancelled(id=ID, epoch=9, attempts=2, in_doubt=True, at_us=9)
    facts = known_facts([doubt, closed])
    assert facts is not None
    row = restored_delivery(facts, START)
    assert (row.state, row.epoch, row.reason, row.doubts_in_all, row.message_id) == (
        "cancelled",
        9,
        "",
        1,
        "<m>",
    )
    sent = pb.MailSent(id=ID, epoch=9, attempt=2, message_id="<m>", resolved=True, at_us=9)
    not_sent = pb.MailFailed(id=ID, epoch=9, attempt=2, reason=NOT_SENT, message_id="<m>", at_us=9)
    for event in (sent, not_sent):
        facts = known_facts([doubt, event])
        assert facts is not None
        assert event_of(restored_delivery(facts, START)) == event


def test_a_late_verdict_leaves_a_deferred_delivery_to_the_sender() -> None:
    deferred = pb.MailDeferred(id=ID, epoch=3, attempt=1, stage="sender", reason="greylisted", at_us=5)
    late = pb.MxFailed(id=ID, epoch=3, attempt=1, reason="no_such_domain", at_us=9)
    for events in ([deferred, late], [late, deferred]):
        facts = known_facts(events)
        assert facts is not None
        assert (facts.state, facts.attempt, facts.reason) == ("deferred", 1, "greylisted")


def test_events_of_other_stages_say_nothing_about_the_delivery() -> None:
    task = mail_task(0)
    for event in (
        pb.TaskCreated(task=task),
        pb.MxOk(task=task),
        pb.MailDeferred(id=task.id, stage="validator"),
    ):
        assert delivery_facts(event, 1) is None


@given(st.lists(events_of(mail_task(0)), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_events_does_not_matter(events: list[Event], rng: random.Random) -> None:
    # Of two events in one version the first one stays. Here each version has one event.
    distinct = list({delta(event).version: event for event in events}.values())
    for event in distinct:
        # All attempts of a mail have one Message-ID.
        if getattr(event, "message_id", ""):
            event.message_id = "<m>"  # type: ignore[union-attr]
    shuffled = [*distinct, *distinct[:3]]
    rng.shuffle(shuffled)
    assert known_facts(distinct) == known_facts(shuffled)


@given(st.lists(events_of(mail_task(0)) | events_of(mail_task(1)) | events_of(mail_task(2)), max_size=20))
def test_a_batch_is_the_fold_of_its_events(events: list[Event]) -> None:
    folded = FoldedBatch()
    for event in events:
        folded.add(event)
    for number in range(3):
        id_ = mail_task(number).id
        row = None
        mine = [event for event in events if delta(event).id == id_]
        for event in mine:
            row = fold(row, event)
        assert folded.rows.get(id_) == row
        assert {key for owner, key in folded.entries if owner == id_} == {event_key(e)[:96] for e in mine}
    first, second = folded.halves()
    assert {**first.rows, **second.rows} == folded.rows
    assert {**first.entries, **second.entries} == folded.entries
    assert {**first.bodies, **second.bodies} == folded.bodies
    assert {**first.facts, **second.facts} == folded.facts
    assert not first.rows.keys() & second.rows.keys()


def test_an_event_without_a_body_does_not_hide_one_with_a_body() -> None:
    without = mail_task(0)
    without.ClearField("body")
    without.ClearField("html")
    folded = FoldedBatch()
    folded.add(pb.TaskCreated(task=without, epoch=1))
    folded.add(pb.TaskCreated(task=mail_task(0)))
    assert folded.bodies[without.id].body == "body"
