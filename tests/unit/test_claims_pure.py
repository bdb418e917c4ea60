"""The rules of the claims: both tables of decide.py cell by cell, and random histories of many senders."""

import random
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.deliveries.decide import (
    IN_DOUBT,
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    DeliveryState,
    Settled,
    Stale,
    Taken,
    Wait,
    decide,
    released_row,
)
from services.common.deliveries.settlement import Settlement, settlement

ID = bytes(range(16))
NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000)
NOW_US = 1_772_366_400_250_000
LEASE = timedelta(seconds=20)
MINE, THEIRS = b"mine" * 4, b"them" * 4

STATES: tuple[DeliveryState, ...] = ("sent", "released", "deferred", "failed", "uncertain", "cancelled")


def row(state: DeliveryState, epoch: int = 5, attempt: int = 2, lease: float = 0, **more: Any) -> Delivery:
    base = Delivery(
        ID,
        state,
        epoch,
        attempt,
        0,
        THEIRS,
        NOW + timedelta(seconds=lease),
        0 if state == "sending" else 17,
        18 if state == "deferred" else 0,
        "",
        "",
        "",
        "<first@a.test>",
    )
    return base._replace(**more)


def claim(epoch: int = 5, attempt: int = 2, owner: bytes = MINE) -> Claim:
    return Claim(ID, epoch, attempt, owner, "<id@a.test>")


OLDER_EPOCH, OLDER_ATTEMPT, SAME, LATER_ATTEMPT, LATER_EPOCH = (4, 9), (5, 1), (5, 2), (5, 3), (6, 1)
COLUMNS = (OLDER_EPOCH, OLDER_ATTEMPT, SAME, LATER_ATTEMPT, LATER_EPOCH)

# A line for each row of decide.py's first table; the first two columns are its "older".
MATRIX = {
    "sent": "Settled Settled Settled Settled Settled",
    "sending, runs": "Stale Stale Wait Wait Wait",
    "sending, over": "Stale Stale doubt doubt doubt",
    "released": "Stale Stale Taken Taken Taken",
    "released, doubtful": "Stale Stale doubt doubt doubt",
    "deferred": "Stale Stale Settled Taken Taken",
    "failed": "Stale Stale Settled Settled Taken",
    "uncertain": "Stale Stale Settled Settled Taken",
    "cancelled": "Stale Stale Settled Settled Taken",
}
CELLS = [
    (state, key, expected)
    for state, line in MATRIX.items()
    for key, expected in zip(COLUMNS, line.split(), strict=True)
]


def found(state: str) -> Delivery:
    if state == "sending, runs":
        return row("sending", lease=7.5)
    if state == "released, doubtful":
        return row("released", reason=IN_DOUBT, doubts_in_all=1, doubts_in_epoch=1)
    return row("sending", lease=0) if state == "sending, over" else row(state)  # type: ignore[arg-type]


def kind(answer: ClaimAnswer) -> str:
    return "doubt" if isinstance(answer, Taken) and answer.doubtful else type(answer).__name__


@pytest.mark.parametrize(("state", "key", "expected"), CELLS)
def test_every_cell_of_the_claims_table(state: str, key: tuple[int, int], expected: str) -> None:
    before = found(state)
    answer, write = decide(before, claim(*key), NOW, LEASE, hold=False)
    assert kind(answer) == expected
    match answer:
        case Taken(taken):
            assert write == taken
            assert (taken.state, taken.epoch, taken.attempt, taken.owner) == ("sending", *key, MINE)
            assert taken.lease_until == NOW + LEASE
            reason = IN_DOUBT if expected == "doubt" else ""
            assert (taken.settled_at, taken.next_attempt_at, taken.reason, taken.reply) == (0, 0, reason, "")
            assert taken.message_id == "<first@a.test>", "all attempts carry the first one's Message-ID"
            assert taken.doubts_in_all == (expected == "doubt")
        case Settled(stored):
            assert (stored, write) == (before, None)
        case Wait(seconds):
            assert (seconds, write) == (7.5, None)
        case Stale():
            assert write is None


def test_a_task_without_a_delivery_is_taken() -> None:
    answer, write = decide(None, claim(), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert not answer.doubtful
    assert write == answer.row
    assert answer.row.message_id == "<id@a.test>"
    assert answer.row.lease_until == NOW + LEASE


@pytest.mark.parametrize("key", [SAME, LATER_ATTEMPT, LATER_EPOCH])
def test_under_hold_what_is_in_doubt_is_stored_as_uncertain(key: tuple[int, int]) -> None:
    answer, write = decide(row("sending"), claim(*key), NOW, LEASE, hold=True)
    assert isinstance(answer, Settled)
    held = answer.row
    assert write == held
    assert (held.state, held.reason, held.epoch, held.attempt) == ("uncertain", IN_DOUBT, *key)
    assert held.settled_at == NOW_US
    assert held.message_id == "<first@a.test>"
    again, write = decide(held, claim(*key), NOW + LEASE, LEASE, hold=True)
    assert (again, write) == (Settled(held), None)


@pytest.mark.parametrize("key", [SAME, LATER_ATTEMPT, LATER_EPOCH])
def test_a_takeover_counts_with_those_of_earlier_attempts(key: tuple[int, int]) -> None:
    answer, _ = decide(row("sending", doubts_in_all=3), claim(*key), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert answer.row.doubts_in_all == 4


def test_an_attempt_that_left_a_doubt_counts_as_well() -> None:
    answer, _ = decide(row("deferred", reason=IN_DOUBT), claim(*LATER_ATTEMPT), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert (answer.doubtful, answer.row.doubts_in_all) == (False, 1)


def test_a_release_keeps_the_count_of_doubts() -> None:
    answer, _ = decide(row("released", doubts_in_all=2), claim(), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert not answer.doubtful
    assert answer.row.doubts_in_all == 2


@pytest.mark.parametrize("state", ["deferred", "uncertain"])
def test_an_earlier_attempt_in_doubt_comes_with_the_claim(state: DeliveryState) -> None:
    before = row(state, reason=IN_DOUBT)
    answer, _ = decide(before, claim(*LATER_EPOCH), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert answer.earlier == before
    answer, _ = decide(row(state, reason="rejected"), claim(*LATER_EPOCH), NOW, LEASE, hold=False)
    assert isinstance(answer, Taken)
    assert answer.earlier is None


DOUBTFUL = [
    row("sending", doubts_in_all=2, doubts_in_epoch=1),
    row("released", reason=IN_DOUBT, doubts_in_all=3, doubts_in_epoch=2),
    row("deferred", reason=IN_DOUBT, doubts_in_all=2, doubts_in_epoch=1, reply="x", relay="r"),
    row("uncertain", reason=IN_DOUBT, doubts_in_all=2, doubts_in_epoch=1),
]


@pytest.mark.parametrize("key", [LATER_ATTEMPT, LATER_EPOCH])
@pytest.mark.parametrize("before", DOUBTFUL)
def test_a_claim_released_before_its_doubt_is_published_counts_nothing(
    before: Delivery, key: tuple[int, int]
) -> None:
    if before.state == "uncertain":
        key = LATER_EPOCH
    first, known = decide(before, claim(*key), NOW, LEASE, False, 9)
    assert isinstance(first, Taken)
    assert first.row.doubts_in_all == 3, "the doubt is counted once"
    for _ in range(3):
        _, known = settlement(known, released_row(first))
        again, known = decide(known, claim(*key), NOW, LEASE, False, 9)
        assert isinstance(again, Taken)
        assert again.row == first.row
        assert again.doubtful == first.doubtful
        earlier = before._replace(owner=MINE) if first.earlier else None
        assert again.earlier == earlier
    published = again.row._replace(state="released", reason="")
    after, _ = decide(published, claim(*key), NOW, LEASE, hold=True)
    assert isinstance(after, Taken)
    assert (after.doubtful, after.earlier, after.row.doubts_in_all) == (False, None, 3)


@pytest.mark.parametrize("max_resends", [0, 1])
@pytest.mark.parametrize("hold", [False, True])
def test_an_unpublished_doubt_becomes_uncertain_without_a_resend_left(hold: bool, max_resends: int) -> None:
    before = row("released", reason=IN_DOUBT, doubts_in_all=1, doubts_in_epoch=1)
    answer, write = decide(before, claim(), NOW, LEASE, hold, max_resends)
    if hold or not max_resends:
        assert answer == Settled(before._replace(state="uncertain", owner=MINE, settled_at=NOW_US))
        assert write == answer.row
    else:
        assert isinstance(answer, Taken)
        assert (answer.doubtful, answer.row.doubts_in_epoch) == (True, 1)


@pytest.mark.parametrize("before", DOUBTFUL)
def test_a_repeated_claim_still_shows_an_unpublished_doubt(before: Delivery) -> None:
    _, write = decide(before, claim(*LATER_EPOCH), NOW, LEASE, False, 9)
    again, _ = decide(write, claim(*LATER_EPOCH), NOW + 2 * LEASE, LEASE, False, 9)
    assert isinstance(again, Taken)
    assert (again.doubtful, again.row.doubts_in_all) == (True, 3)


def test_a_repeated_claim_shows_no_published_doubt() -> None:
    _, write = decide(
        row("deferred", doubts_in_all=2, doubts_in_epoch=1), claim(*LATER_ATTEMPT), NOW, LEASE, hold=False
    )
    again, _ = decide(write, claim(*LATER_ATTEMPT), NOW + 2 * LEASE, LEASE, hold=False)
    assert isinstance(again, Taken)
    assert not again.doubtful


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("before", [None, *(found(state) for state in MATRIX if state != "sending, runs")])
def test_a_repeated_claim_gets_the_same_answer(before: Delivery | None, hold: bool) -> None:
    first, write = decide(before, claim(*LATER_EPOCH), NOW, LEASE, hold)
    later = NOW + timedelta(minutes=5)
    second, _ = decide(write or before, claim(*LATER_EPOCH), later, LEASE, hold)
    assert kind(second) == kind(first)
    if isinstance(first, Taken) and isinstance(second, Taken):
        assert second.row == first.row._replace(lease_until=later + LEASE)


# --- cancels --------------------------------------------------------------------------------------

CANCELS = {
    "sent": "Settled Settled Settled",
    "sending, runs": "Stale Wait Wait",
    "sending, over": "Stale uncertain uncertain",
    "released": "Stale cancelled cancelled",
    "deferred": "Stale cancelled cancelled",
    "failed": "Stale Settled cancelled",
    "uncertain": "Stale Settled cancelled",
    "cancelled": "Stale Settled cancelled",
}
CANCEL_CELLS = [
    (state, epoch, expected)
    for state, line in CANCELS.items()
    for epoch, expected in zip((4, 5, 6), line.split(), strict=True)
]


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize(("state", "epoch", "expected"), CANCEL_CELLS)
def test_every_cell_of_the_cancels_table(state: str, epoch: int, expected: str, hold: bool) -> None:
    before = found(state)
    answer, write = decide(before, Cancel(ID, epoch, MINE), NOW, LEASE, hold)
    if expected in ("cancelled", "uncertain"):
        assert isinstance(answer, Settled)
        assert write == answer.row
        assert (answer.row.state, answer.row.epoch) == (expected, epoch)
        assert answer.row.message_id == "<first@a.test>"
    else:
        assert (kind(answer), write) == (expected, None)
        if isinstance(answer, Settled):
            assert answer.row == before


@pytest.mark.parametrize("doubt", [{"reason": IN_DOUBT}, {"doubts_in_all": 1}])
@pytest.mark.parametrize("state", ["released", "deferred", "failed", "uncertain"])
@pytest.mark.parametrize("hold", [False, True])
def test_a_mail_that_was_ever_in_doubt_is_uncertain_when_cancelled(
    state: DeliveryState, doubt: dict[str, Any], hold: bool
) -> None:
    answer, write = decide(row(state, **doubt), Cancel(ID, 6, MINE), NOW, LEASE, hold)
    assert isinstance(answer, Settled)
    assert write == answer.row
    assert (write.state, write.epoch, write.reason, write.owner) == ("uncertain", 6, IN_DOUBT, MINE)


def test_a_cancelled_task_without_a_delivery_is_not_sent() -> None:
    answer, write = decide(None, Cancel(ID, 5, MINE), NOW, LEASE, hold=False)
    assert isinstance(answer, Settled)
    assert write is not None
    assert (write.state, write.epoch) == ("cancelled", 5)
    after, _ = decide(write, claim(5, 1, THEIRS), NOW, LEASE, hold=False)
    assert after == Settled(write)


# --- settlements ----------------------------------------------------------------------------------


def settled(state: DeliveryState, **more: Any) -> Delivery:
    return row(state, owner=MINE, settled_at=99, reply="250 ok", relay="r", **more)


@pytest.mark.parametrize("state", ["sent", "deferred", "failed", "uncertain", "released"])
def test_a_settle_is_stored_once_while_the_claim_is_held(state: DeliveryState) -> None:
    wish = settled(state)
    assert settlement(row("sending", owner=MINE), wish) == (Settlement.STORED, wish)
    assert settlement(wish, wish) == (Settlement.STORED, None)


@pytest.mark.parametrize("state", ["deferred", "failed", "uncertain", "released"])
@pytest.mark.parametrize("found_state", [*STATES, "sending"])
def test_a_settle_without_a_claim_changes_nothing(state: DeliveryState, found_state: DeliveryState) -> None:
    assert settlement(row(found_state), settled(state)) == (Settlement.FENCED, None)
    assert settlement(None, settled(state)) == (Settlement.FENCED, None)


@pytest.mark.parametrize("found_state", ["sending", "released", "deferred", "failed", "uncertain"])
def test_an_accepted_mail_is_stored_whoever_holds_the_claim(found_state: DeliveryState) -> None:
    became, write = settlement(row(found_state, epoch=6, attempt=4, doubts_in_all=1), settled("sent"))
    assert became is Settlement.LATE
    assert write is not None
    assert (write.state, write.epoch, write.attempt, write.reply) == ("sent", 6, 4, "250 ok")
    # Repeated after a lost answer: the caller must ask what its outcome became.
    assert settlement(write, settled("sent")) == (Settlement.LATE, None)


def test_a_sent_row_stays_as_it_was_stored_first() -> None:
    assert settlement(row("sent"), settled("sent")) == (Settlement.FENCED, None)


@pytest.mark.parametrize("max_resends", [0, 1, 3])
def test_a_mail_in_doubt_is_resent_a_limited_number_of_times(max_resends: int) -> None:
    known, taken, now = None, -1, NOW
    for _ in range(max_resends + 3):
        answer, known = decide(known, claim(), now, LEASE, False, max_resends)
        now += 2 * LEASE
        if not isinstance(answer, Taken):
            break
        taken += 1
        _, known = settlement(known, answer.row._replace(state="released"))
        answer, known = decide(known, claim(), now, LEASE, False, max_resends)
        assert isinstance(answer, Taken), "given back, it costs no resend"
        assert answer.row.doubts_in_epoch == taken
        known = answer.row._replace(owner=THEIRS)
        now += 2 * LEASE
    assert taken == max_resends
    assert isinstance(answer, Settled)
    assert (answer.row.state, answer.row.reason) == ("uncertain", IN_DOUBT)


# --- histories ------------------------------------------------------------------------------------


class World:
    """One task, one row, and senders that claim, freeze, crash, settle and cancel in any order.

    It keeps what really happened, which the rules do not see: each mail that the server accepted.
    """

    def __init__(self, hold: bool) -> None:
        self.hold = hold
        self.now = NOW
        self.row: Delivery | None = None
        self.owners = 0
        self.live: dict[bytes, tuple[Taken, datetime]] = {}
        self.accepted = 0
        self.doubts = 0
        self.known_sent = False
        self.cancelled_before_any_claim = -1

    def token(self) -> bytes:
        self.owners += 1
        return self.owners.to_bytes(16, "big")

    def write(self, new: Delivery | None) -> None:
        if new is None:
            return
        assert not self.known_sent or new.state == "sent", "sent is absorbing"
        self.row = new
        self.known_sent |= new.state == "sent"

    def claim(self, epoch: int, attempt: int) -> None:
        held = [until for _, until in self.live.values() if until > self.now]
        before = self.row
        answer, write = decide(self.row, claim(epoch, attempt, self.token()), self.now, LEASE, self.hold)
        self.write(write)
        if not isinstance(answer, Taken):
            return
        assert not held, "two claims at once without a lease that ran out between"
        assert not self.known_sent
        assert not (self.hold and answer.doubtful)
        if before is not None:
            assert (epoch, attempt) >= (before.epoch, before.attempt), (
                "a record that was overtaken never sends"
            )
        assert epoch > self.cancelled_before_any_claim
        self.live[answer.row.owner] = (answer, self.now + LEASE)

    def cancel(self, epoch: int) -> None:
        answer, write = decide(self.row, Cancel(ID, epoch, self.token()), self.now, LEASE, self.hold)
        self.write(write)
        if isinstance(answer, Settled) and answer.row.state == "cancelled":
            self.cancelled_before_any_claim = max(self.cancelled_before_any_claim, epoch)

    def renew(self, owner: bytes) -> None:
        if self.row is not None and self.row.owner == owner and self.row.state == "sending":
            self.row = self.row._replace(lease_until=self.now + LEASE)
            self.live[owner] = (self.live[owner][0], self.now + LEASE)

    def tell(self, taken: Taken) -> Delivery:
        self.doubts += taken.doubtful + (taken.earlier is not None)
        return taken.row._replace(reason="")

    def release(self, owner: bytes) -> None:
        taken, _ = self.live.pop(owner)
        _, write = settlement(self.row, released_row(taken))
        self.write(write)

    def settle(self, owner: bytes, state: DeliveryState) -> None:
        claimed, until = self.live.pop(owner)
        taken = self.tell(claimed)
        if state == "sent":
            # The guard: an owner whose lease has ended writes no message.
            if until <= self.now:
                return
            self.accepted += 1
        reason = IN_DOUBT if state == "uncertain" else ""
        wish = taken._replace(state=state, settled_at=1, reason=reason)
        _, write = settlement(self.row, wish)
        self.write(write)

    def accepted_and_crashed(self, owner: bytes) -> None:
        taken, until = self.live.pop(owner)
        self.tell(taken)
        self.accepted += until > self.now

    def check(self) -> None:
        assert self.accepted <= 1 + self.doubts, "a second mail without a doubt on record"


STEPS = st.sampled_from(
    [
        "claim",
        "claim",
        "cancel",
        "renew",
        "sent",
        "deferred",
        "failed",
        "released",
        "back",
        "crash",
        "wait",
        "tick",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.booleans(), st.lists(STEPS, min_size=5, max_size=60), st.integers(0, 1 << 32))
def test_no_history_sends_twice_without_a_published_doubt(hold: bool, steps: list[str], seed: int) -> None:
    world = World(hold)
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for step in steps:
        seen[step] += 1
        if step == "claim":
            world.claim(rng.randrange(3), rng.randrange(1, 4))
        elif step == "cancel":
            world.cancel(rng.randrange(3))
        elif step == "tick":
            world.now += timedelta(seconds=rng.uniform(0, 5))
        elif step == "wait":
            world.now += LEASE
        elif world.live:
            owner = rng.choice(list(world.live))
            if step == "renew":
                world.renew(owner)
            elif step == "crash":
                world.accepted_and_crashed(owner)
            elif step == "back":
                world.release(owner)
            else:
                world.settle(owner, step)  # type: ignore[arg-type]
        world.check()
