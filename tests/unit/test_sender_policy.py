"""The outcomes of attempts, and the events of settled rows."""

import random
from dataclasses import replace
from datetime import datetime

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import IN_DOUBT, Delivery
from services.common.deliveries.row_events import event_of
from services.common.events import event_key
from services.common.stage.types import Done, Retry
from services.sender.outcome_of_record import outcome_of_record, takeover_event
from services.sender.policy import Policy
from services.sender.replies import InDoubt, NotSent, Phase, Rejected, Sent

ID = bytes(range(16))
NOW_US = 1_800_000_000_123_456
NOW_MS = NOW_US // 1000
DELAYS = (60, 300, 900)
POLICY = Policy(DELAYS, max_age=86400, hold=False)
HOLD = Policy(DELAYS, max_age=86400, hold=True)
CLAIMED = Delivery(ID, "sending", 7, 1, 2, b"o" * 16, datetime(2026, 1, 1), 0, 0, "", "", "", "<id@a.test>")

GREYLISTED = Rejected(Phase.ENVELOPE, "451 4.7.1 later", False, None, "r:25")
REFUSED = Rejected(Phase.DATA, "550 5.1.1 no such user", True, None, "r:25")
DROPPED = NotSent(Phase.DATA, "connection lost", False, "r:25")
SILENT = InDoubt("timed out", "r:25")


def settled(
    ended: Sent | Rejected | NotSent | InDoubt,
    attempt: int = 1,
    policy: Policy = POLICY,
    age_s: float = 10,
    seed: int = 1,
    *,
    doubts_in_all: int = 0,
) -> Delivery:
    born_us = NOW_US - round(age_s * 1e6)
    claimed = CLAIMED._replace(attempt=attempt, doubts_in_all=doubts_in_all)
    row = policy.outcome_row(claimed, ended, born_us, NOW_US, random.Random(seed))
    kept = ("task_id", "epoch", "attempt", "doubts_in_all", "owner", "message_id")
    assert all(getattr(row, name) == getattr(claimed, name) for name in kept)
    assert row.settled_at == NOW_US
    assert row.relay == "r:25"
    return row


def test_an_accepted_mail_is_sent() -> None:
    row = settled(Sent("250 2.0.0 ok", "r:25"))
    assert (row.state, row.reason, row.reply, row.next_attempt_at) == ("sent", "", "250 2.0.0 ok", 0)


def test_a_5yz_reply_ends_the_task() -> None:
    row = settled(REFUSED)
    assert (row.state, row.reason, row.reply) == ("failed", "rejected", "550 5.1.1 no such user")


@pytest.mark.parametrize(
    ("ended", "reason", "reply"),
    [
        (GREYLISTED, "deferred", "451 4.7.1 later"),
        (DROPPED, "connection_lost", ""),
        (replace(DROPPED, unparsed="hello"), "connection_lost", "hello"),
        (SILENT, IN_DOUBT, ""),
        (replace(SILENT, unparsed="hello"), IN_DOUBT, "hello"),
    ],
)
def test_the_delays_are_used_in_turn_and_the_last_repeats(
    ended: Rejected | NotSent | InDoubt, reason: str, reply: str
) -> None:
    for attempt, delay in [(1, 60), (2, 300), (3, 900), (4, 900), (50, 900)]:
        row = settled(ended, attempt)
        assert (row.state, row.reason, row.reply) == ("deferred", reason, reply)
        wait_s = row.next_attempt_at / 1e6 - NOW_MS / 1e3
        assert delay <= wait_s <= delay * 1.1


def test_the_due_times_of_mails_that_failed_together_differ() -> None:
    assert len({settled(GREYLISTED, seed=seed).next_attempt_at for seed in range(20)}) > 15


@pytest.mark.parametrize(("hint", "delay"), [(1, 60), (60, 60), (61, 300), (301, 900), (5000, 900)])
def test_a_servers_longer_wait_is_granted_up_to_the_longest_delay(hint: float, delay: int) -> None:
    row = settled(Rejected(Phase.ENVELOPE, "451 later", False, hint, "r:25"))
    assert delay <= row.next_attempt_at / 1e6 - NOW_MS / 1e3 <= delay * 1.1


def test_a_servers_shorter_wait_is_not_granted() -> None:
    row = settled(Rejected(Phase.ENVELOPE, "451 later", False, 5, "r:25"), attempt=3)
    assert row.next_attempt_at / 1e6 - NOW_MS / 1e3 >= 900


@pytest.mark.parametrize("ended", [GREYLISTED, DROPPED])
def test_a_task_that_is_too_old_fails_as_expired_with_the_last_reply(ended: Rejected | NotSent) -> None:
    assert settled(ended, age_s=86400).state == "deferred"
    row = settled(ended, age_s=86401)
    assert (row.state, row.reason) == ("failed", "expired")
    assert row.reply == getattr(ended, "reply", "")
    assert row.next_attempt_at == 0


@pytest.mark.parametrize(
    ("doubts_in_all", "state", "reason"), [(0, "failed", "expired"), (1, "uncertain", IN_DOUBT)]
)
def test_a_claimed_task_that_is_too_old_ends_before_its_attempt(
    doubts_in_all: int, state: str, reason: str
) -> None:
    claimed = CLAIMED._replace(doubts_in_all=doubts_in_all)
    assert POLICY.expired(claimed, NOW_US - 86_400_000_000, NOW_US) is None
    row = POLICY.expired(claimed, NOW_US - 86_400_000_001, NOW_US)
    assert row == claimed._replace(state=state, reason=reason, settled_at=NOW_US)


@pytest.mark.parametrize("ended", [GREYLISTED, DROPPED])
def test_an_expired_task_with_an_earlier_doubt_is_uncertain(ended: Rejected | NotSent) -> None:
    row = settled(ended, age_s=86401, doubts_in_all=1)
    assert (row.state, row.reason, row.next_attempt_at) == ("uncertain", IN_DOUBT, 0)


def test_a_mail_in_doubt_never_ends_as_failed() -> None:
    assert settled(SILENT, age_s=86401).state == "uncertain"
    held = settled(SILENT, policy=HOLD)
    assert (held.state, held.reason, held.next_attempt_at) == ("uncertain", IN_DOUBT, 0)


def test_replies_and_relays_fit_their_columns() -> None:
    row = POLICY.outcome_row(CLAIMED, Sent("250 " + "x" * 2000, "y" * 300), NOW_US, NOW_US, random.Random(1))
    assert row.reply == "250 " + "x" * 1020
    assert row.relay == "y" * 255


# --- answers --------------------------------------------------------------------------------------


def test_the_events_of_sent_and_failed_rows_have_all_their_columns() -> None:
    row = settled(Sent("250 ok", "r:25"), attempt=3)
    assert outcome_of_record(row, DELAYS, NOW_MS) == Done(
        [
            pb.MailSent(
                id=ID,
                epoch=7,
                attempt=3,
                message_id="<id@a.test>",
                relay="r:25",
                reply="250 ok",
                at_us=NOW_US,
            )
        ]
    )
    failed = outcome_of_record(settled(REFUSED), DELAYS, NOW_MS)
    uncertain = outcome_of_record(settled(SILENT, policy=HOLD), DELAYS, NOW_MS)
    assert isinstance(failed, Done)
    assert isinstance(uncertain, Done)
    [event], [doubt] = failed.events, uncertain.events
    assert isinstance(event, pb.MailFailed)
    assert isinstance(doubt, pb.MailFailed)
    assert (event.reason, event.reply, event.uncertain) == ("rejected", "550 5.1.1 no such user", False)
    assert (doubt.reason, doubt.uncertain, doubt.message_id) == (IN_DOUBT, True, "<id@a.test>")
    assert (event.at_us, doubt.at_us) == (NOW_US, NOW_US)


def test_a_deferred_record_comes_back_at_its_rows_time() -> None:
    row = settled(GREYLISTED, attempt=2)
    retry = outcome_of_record(row, DELAYS, NOW_MS)
    assert isinstance(retry, Retry)
    assert (retry.delay, retry.due_at_ms * 1000) == (300, row.next_attempt_at)
    assert retry.cause == "deferred 451 4.7.1 later"
    [event] = retry.events
    assert isinstance(event, pb.MailDeferred)
    assert (event.stage, event.attempt, event.next_attempt_at_us) == ("sender", 2, row.next_attempt_at)
    assert (event.in_doubt, event.takeover) == (False, 0)


def test_an_overdue_record_comes_back_at_once() -> None:
    row = settled(GREYLISTED, attempt=3)
    retry = outcome_of_record(row, DELAYS, NOW_MS + 10**9)
    assert isinstance(retry, Retry)
    assert (retry.delay, retry.due_at_ms) == (60, row.next_attempt_at // 1000)


def test_shorter_delays_bring_forward_records_of_longer_ones() -> None:
    retry = outcome_of_record(settled(GREYLISTED, attempt=3), (2, 5), NOW_MS)
    assert isinstance(retry, Retry)
    assert (retry.delay, retry.due_at_ms) == (5, NOW_MS + 5500)


def test_a_cancelled_row_has_no_event_and_a_claimed_one_no_outcome() -> None:
    assert outcome_of_record(CLAIMED._replace(state="cancelled"), DELAYS, NOW_MS) == Done()
    for state in ("sending", "released"):
        with pytest.raises(ValueError, match=state):
            outcome_of_record(CLAIMED._replace(state=state), DELAYS, NOW_MS)


def test_the_doubts_of_one_attempt_are_events_of_their_own() -> None:
    first, second = (takeover_event(CLAIMED._replace(doubts_in_all=n), NOW_US) for n in (1, 2))
    lost_reply = event_of(settled(SILENT, doubts_in_all=2))
    plain = event_of(settled(DROPPED))
    assert len({event_key(event) for event in (first, second, lost_reply, plain)}) == 4
    for doubt in (first, second, lost_reply):
        assert isinstance(doubt, pb.MailDeferred)
        assert doubt.in_doubt
        assert (doubt.reason, doubt.message_id, doubt.attempt) == (IN_DOUBT, "<id@a.test>", 1)
    assert first.next_attempt_at_us == 0
