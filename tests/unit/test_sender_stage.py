"""The sender's handler with claims in memory and a pool that the test controls."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from sqlalchemy.exc import DataError, OperationalError

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import IN_DOUBT, Claim, Delivery, Taken
from services.common.deliveries.row_events import event_of
from services.common.deliveries.rows import owner_tokens
from services.common.events import Event
from services.common.kafka.topics import MX_OK, TASK_CANCELLED
from services.common.stage.types import Done, Outcome, Record, Retry
from services.sender import replies
from services.sender.async_claims import AsyncClaims
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.policy import Policy
from services.sender.replies import InDoubt, LeaseLost, NotSent, Phase, Rejected, Sent
from services.sender.slots import Slots
from services.sender.smtp_mail import OutgoingMail
from services.sender.stage import Sender, stage
from tests.memory_claims import MemoryClaims
from tests.slot_callers import acquire

ID = bytes.fromhex("0190f5e0000070008000000000000001")
MESSAGE_ID = "<0190f5e0-0000-7000-8000-000000000001@a.test>"
NOW_US = 1_800_000_000_000_000
DELAYS = (60, 300)
SENT = Sent("250 2.0.0 ok", "r:25")
REJECTED = Rejected(Phase.ENVELOPE, "550 5.1.1 no", True, None, "r:25")
GREYLISTED = Rejected(Phase.ENVELOPE, "451 later", False, None, "r:25")
OURS = NotSent(Phase.CONNECT, "refused", True, "r:25")
REFUSED_AFTER_DOT = Rejected(Phase.AFTER_DOT, "554 5.7.1 refused", True, None, "r:25")
DROPPED = NotSent(Phase.DATA, "connection lost", False, "r:25")
SILENT = InDoubt("timed out", "r:25")

Answer = replies.SendResult | Exception | Callable[[Callable[[], bool]], Awaitable[replies.SendResult]]


class Exchange:
    """A message that was handed over. The server answers when the test sets `answer`; `cut` tells that the
    sender cut it off."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.answer: asyncio.Future[replies.SendResult] = asyncio.get_running_loop().create_future()
        self.cut = False

    async def __call__(self, guard: Callable[[], bool]) -> replies.SendResult:
        self.begun.set()
        return await self.answer


class Pool:
    """Ends the sends with the given results, in order, and keeps the mails."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.mails: list[tuple[str, str, bytes]] = []
        self.up = asyncio.Event()
        self.up.set()
        self.sends: dict[OutgoingMail, asyncio.Future[None]] = {}
        self.exchanges: dict[OutgoingMail, Exchange] = {}

    @property
    def available(self) -> bool:
        return self.up.is_set()

    async def wait_available(self) -> None:
        await self.up.wait()

    def submit(self, mail: OutgoingMail) -> None:
        answer = self.answers.pop(0)
        self.mails.append((mail.mail_from, mail.rcpt, mail.message))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Exchange):
            self.exchanges[mail] = answer
        self.sends[mail] = asyncio.ensure_future(self._send(mail, answer))

    async def _send(self, mail: OutgoingMail, answer: Answer) -> None:
        if not isinstance(answer, Sent | Rejected | NotSent | InDoubt | LeaseLost):
            answer = await answer(mail.guard)  # type: ignore[operator]
        del self.sends[mail]
        mail.on_result(answer)

    def withdraw(self, mail: OutgoingMail) -> bool:
        if mail in self.exchanges or mail not in self.sends:
            return False
        self.sends.pop(mail).cancel()
        return True

    def cut_off(self, mail: OutgoingMail) -> None:
        self.exchanges[mail].cut = True
        self.sends.pop(mail).cancel()
        mail.on_result(InDoubt("cancelled", "r:25"))


class World:
    """One sender, with its claims, leases, pool and publisher."""

    def __init__(
        self,
        pool: Pool,
        *,
        hold: bool = False,
        lease: float = 20,
        claim_slots: int = 10,
        handover: float = 620,
        max_resends: int = 1,
    ) -> None:
        self.pool = pool
        self.claims = MemoryClaims(lease, hold, max_resends)
        self.shared = AsyncClaims(self.claims, owners_first=0)
        self.leases = Leases(self.shared.renew, lease)
        self.published: list[Event] = []
        self.broker = asyncio.Event()
        self.broker.set()
        self.handover = handover
        self.sender = self.another(claim_slots)

    def another(
        self, claim_slots: int = 10, sessions: int = 0, now_us: Callable[[], int] = lambda: NOW_US
    ) -> Sender:
        """Return another sender with the same claims and the same pool."""
        return Sender(
            claims=self.shared,
            leases=self.leases,
            pool=self.pool,
            composer=Composer("shop@a.test"),
            policy=Policy(DELAYS, 86400, self.claims.hold, self.claims.max_resends),
            claim_slots=Slots(claim_slots, 0),
            session_slots=Slots(sessions or claim_slots, 0),
            publish=self.publish,
            owner=owner_tokens(),
            handover=self.handover,
            now_us=now_us,
            rng=random.Random(1),
        )

    async def publish(self, events: Sequence[Event], traceparent: bytes | None) -> None:
        await self.broker.wait()
        self.published += events

    async def handle(self, record: Record) -> Outcome:
        return await asyncio.wait_for(handle(self.sender, record), 10)

    @property
    def row(self) -> Delivery:
        return self.claims.rows[ID]

    def someone_claims(self, epoch: int = 0, attempt: int = 1) -> Delivery:
        """Have another process claim the task."""
        [answer] = self.claims.claim([Claim(ID, epoch, attempt, random.randbytes(16), MESSAGE_ID)])
        assert isinstance(answer, Taken)
        return answer.row


_handled: dict[Record, asyncio.Future[Outcome]] = {}


def finish(outcomes: Sequence[tuple[Record, Outcome | Exception]]) -> None:
    for record, outcome in outcomes:
        if isinstance(outcome, Exception):
            _handled.pop(record).set_exception(outcome)
        else:
            _handled.pop(record).set_result(outcome)


async def handle(sender: Sender, record: Record) -> Outcome:
    """Return the record's outcome, or raise its error. Cancelled, it cancels the record."""
    assert record not in _handled
    handled = _handled[record] = asyncio.get_running_loop().create_future()
    sender.start([record], finish)
    try:
        return await handled
    except asyncio.CancelledError:
        del _handled[record]
        sender.cancel([record])
        raise


def mx_ok(attempt: int = 1, epoch: int = 0, **task: Any) -> Record:
    fields: dict[str, Any] = {
        "id": ID,
        "email": "ann@b.test",
        "domain": "b.test",
        "subject": "Hello",
        "body": "text",
        "created_at_us": NOW_US - 5_000_000,
    }
    event = pb.MxOk(task=pb.MailTask(**fields | task), epoch=epoch, attempt=1, at_us=NOW_US - 4_000_000)
    return Record(MX_OK, ID, event, attempt, b"00-trace")


def cancelled(epoch: int = 0) -> Record:
    return Record(TASK_CANCELLED, ID, pb.TaskCancelled(id=ID, epoch=epoch, at_us=NOW_US))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def turns() -> None:
    """Let the loop run everything that is due."""
    for _ in range(10):
        await asyncio.sleep(0)


def only_event(outcome: Outcome) -> Any:
    assert isinstance(outcome, Done | Retry)
    [event] = outcome.events
    return event


@pytest.fixture
async def build() -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(*answers: Answer, **options: Any) -> World:
        worlds.append(World(Pool(*answers), **options))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.sender.close()
        await world.shared.close()
        assert len(world.leases) == 0, "every lease is dropped"


# --- how attempts end -----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [SENT, REJECTED, GREYLISTED, DROPPED, SILENT])
async def test_an_outcome_is_stored_and_published_the_same_again_after_a_crash(
    build: Callable[..., World], answer: replies.SendResult
) -> None:
    world = build(answer)
    published = await world.handle(mx_ok())
    assert world.pool.mails[0][:2] == ("shop@a.test", "ann@b.test")
    assert f"Message-ID: {MESSAGE_ID}".encode() in world.pool.mails[0][2]
    again = await world.handle(mx_ok())
    assert again == published, "the record came back, since its sender died before it published"
    assert len(world.pool.mails) == 1
    event = only_event(published)
    assert (event.id, event.attempt, event.epoch, event.at_us) == (ID, 1, 0, NOW_US)
    assert event.message_id == MESSAGE_ID


async def test_a_deferred_task_is_sent_by_its_next_attempt_and_the_first_one_is_then_stale(
    build: Callable[..., World],
) -> None:
    world = build(GREYLISTED, SENT)
    first = await world.handle(mx_ok())
    assert isinstance(first, Retry)
    assert (first.delay, first.due_at_ms >= NOW_US // 1000 + 60_000) == (60, True)
    second = only_event(await world.handle(mx_ok(attempt=2)))
    assert isinstance(second, pb.MailSent)
    assert second.attempt == 2
    assert only_event(await world.handle(mx_ok(attempt=1))) == second
    assert len(world.pool.mails) == 2


async def test_the_next_attempt_first_publishes_the_doubt_of_a_lost_reply(
    build: Callable[..., World],
) -> None:
    world = build(SILENT, SENT)
    first = only_event(await world.handle(mx_ok()))
    assert isinstance(first, pb.MailDeferred)
    assert first.in_doubt
    # As if the first publication had been lost: the doubt is published before the mail goes out again.
    world.broker.clear()
    second = asyncio.ensure_future(world.handle(mx_ok(attempt=2)))
    await until(lambda: world.row.attempt == 2)
    assert len(world.pool.mails) == 1
    world.broker.set()
    assert isinstance(only_event(await second), pb.MailSent)
    assert world.published == [first]
    assert world.pool.mails[0] == world.pool.mails[1], "the same mail, the same Message-ID"


async def test_a_mail_whose_reply_is_always_lost_is_sent_twice_and_then_uncertain(
    build: Callable[..., World],
) -> None:
    world = build(SILENT, SILENT, SILENT)
    assert isinstance(await world.handle(mx_ok()), Retry)
    event = only_event(await world.handle(mx_ok(attempt=2)))
    assert (event.uncertain, event.reason) == (True, IN_DOUBT)
    assert only_event(await world.handle(mx_ok(attempt=3))) == event
    assert len(world.pool.mails) == 2
    epoch = NOW_US // 1000
    assert isinstance(await world.handle(mx_ok(epoch=epoch)), Retry), "opened again, it has a resend again"


async def test_lost_replies_and_takeovers_count_alike(build: Callable[..., World]) -> None:
    world = build(SILENT)
    await world.handle(mx_ok())
    world.someone_claims(attempt=2)
    world.claims.expire()
    event = only_event(await world.handle(mx_ok(attempt=2)))
    assert (event.uncertain, event.reason) == (True, IN_DOUBT)
    assert len(world.pool.mails) == 1


async def test_under_hold_a_reply_that_was_lost_leaves_the_task_uncertain(
    build: Callable[..., World],
) -> None:
    world = build(SILENT, hold=True)
    event = only_event(await world.handle(mx_ok()))
    assert isinstance(event, pb.MailFailed)
    assert (event.uncertain, event.reason) == (True, IN_DOUBT)
    assert only_event(await world.handle(mx_ok(attempt=2))) == event


async def test_a_task_from_which_no_mail_can_be_built_fails(build: Callable[..., World]) -> None:
    world = build()
    event = only_event(await world.handle(mx_ok(headers={"To": "else@b.test"})))
    assert isinstance(event, pb.MailFailed)
    assert event.reason == "unsendable"


@pytest.mark.parametrize(
    ("created_s", "epoch_s", "due_s", "state"),
    [
        (86000, 0, None, "deferred"),
        (86500, 0, None, "failed"),
        (10**6, 86000, None, "deferred"),
        (10**6, 86500, None, "failed"),
        (10**6, 0, 86000, "deferred"),
        (10**6, 0, 86500, "failed"),
    ],
)
async def test_a_tasks_age_counts_from_its_recording_reopening_or_due_time(
    build: Callable[..., World], created_s: int, epoch_s: int, due_s: int | None, state: str
) -> None:
    """The validator looks a scheduled task up at its due time, whenever it was recorded."""
    world = build(GREYLISTED)
    record = mx_ok(
        epoch=NOW_US // 1000 - epoch_s * 1000 if epoch_s else 0, created_at_us=NOW_US - created_s * 1_000_000
    )
    record.event.at_us = 0 if due_s is None else NOW_US - due_s * 1_000_000
    await world.handle(record)
    assert world.row.state == state
    assert len(world.pool.mails) == (state == "deferred"), "what is too old is not sent"


async def test_a_first_attempt_that_comes_too_late_fails_as_expired_unsent(
    build: Callable[..., World],
) -> None:
    world = build()
    record = mx_ok(created_at_us=NOW_US - 86401 * 1_000_000)
    record.event.at_us = 0
    event = only_event(await world.handle(record))
    assert isinstance(event, pb.MailFailed)
    assert (event.reason, event.uncertain, event.at_us) == ("expired", False, NOW_US)
    assert only_event(await world.handle(record)) == event


async def test_the_age_is_checked_after_the_wait_for_a_session(build: Callable[..., World]) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hang(guard: Callable[[], bool]) -> replies.SendResult:
        entered.set()
        await leave.wait()
        return SENT

    world = build(hang)
    now = [NOW_US]
    sender = world.another(now_us=lambda: now[0], sessions=1)
    first = asyncio.ensure_future(handle(sender, mx_ok(id=bytes(16))))
    await entered.wait()
    second = asyncio.ensure_future(handle(sender, mx_ok()))
    await until(lambda: ID in world.claims.rows)
    now[0] += 86400 * 1_000_000
    leave.set()
    await first
    assert only_event(await second).reason == "expired"
    assert len(world.pool.mails) == 1


@pytest.mark.parametrize("lost_reply", [True, False])
async def test_an_expired_task_in_doubt_ends_as_uncertain_unsent(
    build: Callable[..., World], lost_reply: bool
) -> None:
    world = build(*[SILENT] * lost_reply)
    if lost_reply:
        await world.handle(mx_ok())
    else:
        world.someone_claims()
        world.claims.expire()
    record = mx_ok(attempt=1 + lost_reply, created_at_us=NOW_US - 86401 * 1_000_000)
    record.event.at_us = 0
    event = only_event(await world.handle(record))
    assert isinstance(event, pb.MailFailed)
    assert (event.reason, event.uncertain) == (IN_DOUBT, True)
    assert len(world.pool.mails) == lost_reply
    assert len(world.published) == 1, "the doubt is on record too"


# --- claims of others -----------------------------------------------------------------------------


async def test_a_handler_waits_for_anothers_claim_and_publishes_its_outcome(
    build: Callable[..., World],
) -> None:
    world = build()
    theirs = world.someone_claims()
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.claims.calls > 1)
    assert not task.done()
    world.claims.store([theirs._replace(state="sent", settled_at=7, reply="250 theirs", relay="x")])
    event = only_event(await task)
    assert (event.reply, event.at_us) == ("250 theirs", 7)
    assert world.pool.mails == []


async def test_a_waiting_handler_keeps_no_other_from_sending(build: Callable[..., World]) -> None:
    world = build(SENT, claim_slots=1)
    world.someone_claims()
    waiting = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.claims.calls > 1)
    other = bytes(16)
    assert isinstance(only_event(await world.handle(mx_ok(id=other))), pb.MailSent)
    waiting.cancel()
    await asyncio.wait({waiting})


async def test_a_takeover_is_published_before_the_mail_goes_out_again(build: Callable[..., World]) -> None:
    world = build(SENT)
    world.someone_claims()
    world.claims.expire()
    world.broker.clear()
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.row.doubts_in_all == 1)
    assert world.pool.mails == []
    world.broker.set()
    assert isinstance(only_event(await task), pb.MailSent)
    [doubt] = world.published
    assert isinstance(doubt, pb.MailDeferred)
    assert (doubt.in_doubt, doubt.takeover, doubt.attempt) == (True, 0, 1)
    assert doubt.message_id == MESSAGE_ID


async def test_under_hold_a_dead_senders_claim_is_never_taken_over(build: Callable[..., World]) -> None:
    world = build(hold=True)
    world.someone_claims()
    world.claims.expire()
    event = only_event(await world.handle(mx_ok()))
    assert isinstance(event, pb.MailFailed)
    assert event.uncertain
    assert world.published == []


async def test_an_overtaken_record_publishes_nothing(build: Callable[..., World]) -> None:
    world = build()
    world.someone_claims(epoch=3)
    assert await world.handle(mx_ok(epoch=2)) == Done()


# --- a claim that is lost -------------------------------------------------------------------------


def taken_over_meanwhile(world: World, answer: replies.SendResult) -> Answer:
    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        world.claims.expire()
        world.theirs = world.someone_claims()  # type: ignore[attr-defined]
        return answer

    return send


@pytest.mark.parametrize("answer", [REJECTED, GREYLISTED, DROPPED, SILENT])
async def test_after_a_lost_claim_the_new_owners_outcome_is_published(
    build: Callable[..., World], answer: replies.SendResult
) -> None:
    world = build()
    world.pool.answers.append(taken_over_meanwhile(world, answer))
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: hasattr(world, "theirs"))
    theirs: Delivery = world.theirs  # type: ignore[attr-defined]
    before = world.claims.calls
    await until(lambda: world.claims.calls > before + 1)
    assert world.row == theirs
    world.claims.store([theirs._replace(state="sent", settled_at=7, reply="250 theirs")])
    assert only_event(await task).reply == "250 theirs"
    assert len(world.pool.mails) == 1


async def test_an_accepted_mail_is_published_as_sent_though_its_claim_was_lost(
    build: Callable[..., World],
) -> None:
    world = build()
    world.pool.answers.append(taken_over_meanwhile(world, SENT))
    event = only_event(await world.handle(mx_ok()))
    assert isinstance(event, pb.MailSent)
    assert event.reply == "250 2.0.0 ok"
    assert world.claims.renew([world.theirs]) == [False]  # type: ignore[attr-defined]


async def test_a_claim_whose_lease_ended_before_the_mail_is_released_and_claimed_anew(
    build: Callable[..., World],
) -> None:
    states = []

    async def too_late(guard: Callable[[], bool]) -> replies.SendResult:
        await until(lambda: not guard())
        return LeaseLost(Phase.DATA)

    async def in_time(guard: Callable[[], bool]) -> replies.SendResult:
        states.append((guard(), world.row.doubts_in_all))
        return SENT

    world = build(too_late, in_time, lease=0.05)
    assert isinstance(only_event(await world.handle(mx_ok())), pb.MailSent)
    assert states == [(True, 0)]
    assert world.published == [], "nothing was sent, so nothing is in doubt"


# --- our own trouble ------------------------------------------------------------------------------


async def test_relay_trouble_costs_no_attempt_and_leaves_no_claim(
    build: Callable[..., World],
) -> None:
    async def goes_down(guard: Callable[[], bool]) -> replies.SendResult:
        world.pool.up.clear()
        return OURS

    world = build(goes_down, SENT)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: ID in world.claims.rows and world.row.state == "released")
    world.claims.expire()
    world.pool.up.set()
    event = only_event(await task)
    assert isinstance(event, pb.MailSent)
    assert event.attempt == 1
    assert world.row.doubts_in_all == 0


async def test_nothing_is_claimed_while_the_relay_is_down(build: Callable[..., World]) -> None:
    world = build(SENT)
    world.pool.up.clear()
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await turns()
    assert world.claims.rows == {}
    world.pool.up.set()
    assert isinstance(only_event(await task), pb.MailSent)


async def test_a_mail_that_waits_when_the_relay_goes_down_is_not_claimed(
    build: Callable[..., World],
) -> None:
    async def goes_down(guard: Callable[[], bool]) -> replies.SendResult:
        world.pool.up.clear()
        await turns()
        return OURS

    ids = [number.to_bytes(16, "big") for number in range(1, 41)]
    world = build(*[goes_down] * 4, *[SENT] * 40, claim_slots=4)
    tasks = [asyncio.ensure_future(world.handle(mx_ok(id=id_))) for id_ in ids]
    await until(lambda: len(world.pool.mails) == 4)
    await until(lambda: {row.state for row in world.claims.rows.values()} == {"released"})
    await until(lambda: world.sender.domains() == [])
    assert len(world.claims.rows) == 4
    world.pool.up.set()
    ended = await asyncio.gather(*tasks)
    assert {type(only_event(outcome)) for outcome in ended} == {pb.MailSent}


async def test_the_probe_is_claimed_though_the_relay_is_down(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def taken(guard: Callable[[], bool]) -> replies.SendResult:
        world.pool.up.set()
        return SENT

    world = build(taken)
    world.pool.up.clear()
    offered = asyncio.Event()
    monkeypatch.setattr(world.pool, "wait_available", offered.wait)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await turns()
    assert world.pool.mails == []
    offered.set()
    assert isinstance(only_event(await task), pb.MailSent)


async def lost_its_lease(guard: Callable[[], bool]) -> replies.SendResult:
    return LeaseLost(Phase.ENVELOPE)


@pytest.mark.parametrize(
    ("answers", "task", "counted"),
    [
        ([OURS, SENT], {}, 1),
        ([lost_its_lease, SENT], {}, 1),
        ([], {"headers": {"To": "else@b.test"}}, 0),
        ([], {"created_at_us": NOW_US - 86401 * 1_000_000}, 0),
        ([SENT], {}, 1),
        ([GREYLISTED], {}, 1),
        ([DROPPED], {}, 1),
    ],
)
async def test_only_a_mail_that_was_tried_counts_for_the_domains_rate(
    build: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Answer],
    task: dict[str, Any],
    counted: int,
) -> None:
    world = build(*answers)
    world.sender._attempts.claim_slots = claim_slots = Slots(4, 0, rate=1000)
    count = 0

    def take(domain: str, now: float) -> None:
        nonlocal count
        count += 1

    refund_rate = claim_slots.refund_rate

    def refund(domain: str) -> None:
        nonlocal count
        count -= 1
        refund_rate(domain)

    monkeypatch.setattr(claim_slots, "_count_rate", take)
    monkeypatch.setattr(claim_slots, "refund_rate", refund)
    record = mx_ok(**task)
    if "created_at_us" in task:
        record.event.at_us = 0
    await world.handle(record)
    assert count == counted


async def test_a_handler_cancelled_before_the_handover_costs_nothing_of_the_rate(
    build: Callable[..., World],
) -> None:
    world = build()
    world.sender._attempts.claim_slots = claim_slots = Slots(4, 0, rate=1)
    world.someone_claims()
    world.claims.expire()
    world.broker.clear()
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: len(world.leases) == 1)
    await cancel_and_close(world, task)
    await asyncio.wait_for(acquire(claim_slots, "b.test"), 0.5)
    world.broker.set()


def refused(number: int) -> Exception:
    cause = Exception("server says no")
    cause.errno = number  # type: ignore[attr-defined]
    return OperationalError("INSERT", (), cause)


@pytest.mark.parametrize("number", [2003, 1045, 1146])
async def test_a_handler_waits_for_the_database_and_shows_that(
    build: Callable[..., World], number: int
) -> None:
    world = build(SENT)
    world.claims.errors = [refused(number)] * 1000
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.shared.trouble is not None)
    world.claims.recover()
    assert isinstance(only_event(await task), pb.MailSent)
    assert world.shared.trouble is None


async def test_an_outcome_waits_for_the_database(build: Callable[..., World]) -> None:
    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        world.claims.errors = [refused(2013), refused(2003)]
        return SENT

    world = build(send)
    assert isinstance(only_event(await world.handle(mx_ok())), pb.MailSent)
    assert world.row.state == "sent"


async def test_a_value_that_does_not_fit_fails_its_own_task_alone(build: Callable[..., World]) -> None:
    world = build()
    world.claims.errors = [DataError("INSERT", (), Exception("too long"))]
    with pytest.raises(DataError):
        await world.handle(mx_ok())


# --- being cancelled ------------------------------------------------------------------------------


async def cancel_and_close(world: World, task: asyncio.Future[Outcome]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(world.sender.close(), 10)


async def test_a_handler_cancelled_before_the_handover_releases_the_claim(
    build: Callable[..., World],
) -> None:
    sending = asyncio.Event()

    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        sending.set()
        await asyncio.sleep(60)
        return SENT

    world = build(send)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await sending.wait()
    await cancel_and_close(world, task)
    assert world.row.state == "released"


async def cancel_amid_the_exchange(world: World, exchange: Exchange) -> None:
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await exchange.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("answer", "state"), [(SENT, "sent"), (REFUSED_AFTER_DOT, "failed"), (SILENT, "deferred")]
)
async def test_a_handed_over_mail_goes_on_and_the_next_owner_publishes_its_outcome(
    build: Callable[..., World], answer: replies.SendResult, state: str
) -> None:
    exchange = Exchange()
    world = build(exchange)
    await cancel_amid_the_exchange(world, exchange)
    closing = asyncio.ensure_future(world.sender.close())
    # The record is redelivered, to this sender or another, while the mail is still under way.
    calls = world.claims.calls
    again = asyncio.ensure_future(handle(world.another(), mx_ok()))
    await until(lambda: world.claims.calls > calls + 1)
    assert world.row.state == "sending"
    assert world.sender.handed_over == len(world.leases) == 1, "its lease is renewed"
    assert not closing.done(), "a drain waits"
    exchange.answer.set_result(answer)
    await asyncio.wait_for(closing, 10)
    assert (world.row.state, world.row.doubts_in_all) == (state, 0)
    assert only_event(await again).at_us == NOW_US
    assert len(world.pool.mails) == 1


async def test_a_claim_without_a_takeover_yet_is_polled_at_intervals(
    build: Callable[..., World],
) -> None:
    world = build(SENT)
    world.shared = AsyncClaims(world.claims, owners_first=60)
    world.someone_claims()
    world.claims.expire()
    calls = world.claims.calls
    waiting = asyncio.ensure_future(handle(world.another(), mx_ok()))
    await until(lambda: world.claims.calls > calls)
    # Without intervals the loop would ask thousands of times.
    await asyncio.sleep(0.3)
    assert world.claims.calls <= calls + 2
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_late_outcome_is_published_where_the_next_owner_has_ended(
    build: Callable[..., World],
) -> None:
    exchange = Exchange()
    world = build(exchange, hold=True)
    await cancel_amid_the_exchange(world, exchange)
    world.claims.expire()
    next_owner = only_event(await handle(world.another(), mx_ok()))
    assert next_owner.uncertain
    exchange.answer.set_result(SENT)
    await asyncio.wait_for(world.sender.close(), 10)
    assert world.row.state == "sent"
    [event] = world.published
    assert isinstance(event, pb.MailSent)
    assert event.id == ID


async def test_a_handed_over_mail_keeps_its_slots_until_it_is_settled(build: Callable[..., World]) -> None:
    exchange = Exchange()
    world = build(exchange, SENT, claim_slots=1)
    await cancel_amid_the_exchange(world, exchange)
    other = asyncio.ensure_future(world.handle(mx_ok(id=bytes(16))))
    await turns()
    assert not other.done()
    exchange.answer.set_result(SENT)
    assert isinstance(only_event(await other), pb.MailSent)


async def test_a_handed_over_mail_without_a_reply_ends_in_doubt_at_the_limit(
    build: Callable[..., World],
) -> None:
    exchange = Exchange()
    world = build(exchange, handover=0.05)
    await cancel_amid_the_exchange(world, exchange)
    await asyncio.wait_for(world.sender.close(), 10)
    assert exchange.cut
    assert (world.row.state, world.row.reason) == ("deferred", IN_DOUBT)


async def test_a_handed_over_mails_outcome_waits_for_the_database_past_its_lease(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sender.cancelled._CLEANUP_TIMEOUT", 0)
    exchange = Exchange()
    world = build(exchange, handover=10)
    await cancel_amid_the_exchange(world, exchange)
    world.claims.errors = [refused(2003)] * 1000
    exchange.answer.set_result(SENT)
    await until(lambda: world.shared.trouble is not None)
    await turns()
    assert len(world.leases) == 1
    world.claims.recover()
    await asyncio.wait_for(world.sender.close(), 10)
    assert world.row.state == "sent"


async def test_a_sent_mail_whose_handler_is_cancelled_keeps_its_lease_until_it_is_stored(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sender.cancelled._CLEANUP_TIMEOUT", 0)

    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        world.claims.errors = [refused(2003)] * 1000
        return SENT

    world = build(send)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.shared.trouble is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await turns()
    assert len(world.leases) == world.sender.handed_over == 1
    world.claims.recover()
    await asyncio.wait_for(world.sender.close(), 10)
    assert world.row.state == "sent"


async def test_a_handler_cancelled_while_it_claims_releases_the_claim(build: Callable[..., World]) -> None:
    world = build()
    world.claims.gate.clear()
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.claims.calls == 1)
    task.cancel()
    world.claims.gate.set()
    await cancel_and_close(world, task)
    assert world.row.state == "released"


async def test_a_record_cancelled_before_the_database_is_asked_claims_nothing(
    build: Callable[..., World],
) -> None:
    world = build()
    record = mx_ok()
    world.sender.start([record], finish)
    world.sender.cancel([record])
    await asyncio.wait_for(world.sender.close(), 10)
    assert world.claims.calls == 0
    assert world.sender.domains() == []


async def test_mails_that_wait_make_one_claim_and_one_store(build: Callable[..., World]) -> None:
    world = build(*[SENT] * 8)
    records = [mx_ok(id=number.to_bytes(16, "big")) for number in range(1, 9)]
    ended = await asyncio.gather(*map(world.handle, records))
    assert {type(only_event(outcome)) for outcome in ended} == {pb.MailSent}
    assert world.claims.calls == 2


async def test_a_handler_cancelled_while_it_settles_still_settles(build: Callable[..., World]) -> None:
    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        world.claims.gate.clear()
        return SENT

    world = build(send)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.claims.calls == 2)
    task.cancel()
    world.claims.gate.set()
    await cancel_and_close(world, task)
    assert world.row.state == "sent"


async def test_an_outcome_that_waits_for_the_database_is_stored_after_a_cancellation(
    build: Callable[..., World],
) -> None:
    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        world.claims.errors = [refused(2003)] * 1000
        return SENT

    world = build(send)
    task = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: world.shared.trouble is not None)
    task.cancel()
    world.claims.recover()
    await cancel_and_close(world, task)
    assert world.row.state == "sent"


async def in_doubt(world: World, doubt: str) -> Record:
    """Put the task in doubt; return its next record."""
    if doubt == "takeover":
        world.someone_claims()
        world.claims.expire()
        return mx_ok()
    await world.handle(mx_ok())
    return mx_ok(attempt=2) if doubt == "lost reply" else mx_ok(epoch=1)


DOUBTS = pytest.mark.parametrize(
    ("doubt", "answers", "hold"),
    [
        ("takeover", [SENT], False),
        ("lost reply", [SILENT, SENT], False),
        ("lost reply, opened again", [SILENT, SENT], True),
    ],
)


@DOUBTS
@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancellation_before_the_doubt_is_published_costs_no_resend(
    build: Callable[..., World], doubt: str, answers: list[replies.SendResult], hold: bool, times: int
) -> None:
    world = build(*answers, hold=hold)
    record = await in_doubt(world, doubt)
    before, mails = world.row, len(world.pool.mails)
    world.broker.clear()
    for _ in range(times):
        task = asyncio.ensure_future(world.handle(record))
        await until(lambda: len(world.leases) == 1)
        await cancel_and_close(world, task)
        world.claims.expire()
    task = asyncio.ensure_future(world.handle(record))
    await until(lambda: len(world.leases) == 1)
    await turns()
    assert len(world.pool.mails) == mails, "nothing is sent before the doubt is on record"
    world.broker.set()
    assert isinstance(only_event(await task), pb.MailSent)
    [event] = world.published
    if doubt == "takeover":
        assert (event.in_doubt, event.attempt, event.takeover) == (True, 1, 0)
    else:
        assert event == event_of(before)
    assert world.row.doubts_in_all == 1


@DOUBTS
async def test_a_cancellation_while_claiming_a_mail_in_doubt_costs_no_resend(
    build: Callable[..., World], doubt: str, answers: list[replies.SendResult], hold: bool
) -> None:
    world = build(*answers, hold=hold)
    record = await in_doubt(world, doubt)
    calls = world.claims.calls
    world.claims.gate.clear()
    task = asyncio.ensure_future(world.handle(record))
    await until(lambda: world.claims.calls > calls)
    task.cancel()
    world.claims.gate.set()
    await cancel_and_close(world, task)
    assert world.claims.calls == calls + 2, "claimed once and given back"
    world.claims.expire()
    assert isinstance(only_event(await world.handle(record)), pb.MailSent)
    assert len(world.published) == 1


async def test_a_cancellation_while_claiming_after_an_earlier_doubt_releases_the_claim(
    build: Callable[..., World],
) -> None:
    world = build(SILENT, GREYLISTED, SENT)
    await world.handle(mx_ok())
    await world.handle(mx_ok(attempt=2))
    calls, published = world.claims.calls, len(world.published)
    world.claims.gate.clear()
    task = asyncio.ensure_future(world.handle(mx_ok(attempt=3)))
    await until(lambda: world.claims.calls > calls)
    task.cancel()
    world.claims.gate.set()
    await cancel_and_close(world, task)
    assert (world.row.state, world.row.reason) == ("released", "")
    assert isinstance(only_event(await world.handle(mx_ok(attempt=3))), pb.MailSent)
    assert len(world.published) == published, "no doubt is told twice"


def lose_the_answer(world: World) -> None:
    """Lose the connection once a claim is committed."""
    claim = world.claims.claim

    def once(*arguments: Any) -> Any:
        world.claims.claim = claim  # type: ignore[method-assign]
        claim(*arguments)
        raise refused(2013)

    world.claims.claim = once  # type: ignore[method-assign]


async def test_a_lost_answer_to_a_claim_publishes_no_doubt_without_an_attempt(
    build: Callable[..., World],
) -> None:
    world = build(SILENT, GREYLISTED, SENT)
    await world.handle(mx_ok())
    await world.handle(mx_ok(attempt=2))
    published = len(world.published)
    lose_the_answer(world)
    assert isinstance(only_event(await world.handle(mx_ok(attempt=3))), pb.MailSent)
    assert world.published[published:] == []


@DOUBTS
async def test_a_lost_answer_to_a_claim_publishes_an_existing_doubt_first(
    build: Callable[..., World], doubt: str, answers: list[replies.SendResult], hold: bool
) -> None:
    world = build(*answers, hold=hold)
    record = await in_doubt(world, doubt)
    world.broker.clear()
    lose_the_answer(world)
    task = asyncio.ensure_future(world.handle(record))
    await until(lambda: len(world.leases) == 1)
    await turns()
    assert len(world.pool.mails) == len(answers) - 1
    world.broker.set()
    assert isinstance(only_event(await task), pb.MailSent)
    [event] = world.published
    assert (event.in_doubt, event.attempt) == (True, record.attempt)


async def test_a_handler_cancelled_while_it_waits_for_a_claim_slot_leaves_nothing(
    build: Callable[..., World],
) -> None:
    started = asyncio.Event()

    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        started.set()
        await asyncio.sleep(60)
        return SENT

    world = build(send, SENT, claim_slots=1)
    first = asyncio.ensure_future(world.handle(mx_ok(id=bytes(16))))
    await started.wait()
    second = asyncio.ensure_future(world.handle(mx_ok()))
    await asyncio.sleep(0)
    await cancel_and_close(world, second)
    assert ID not in world.claims.rows
    await cancel_and_close(world, first)
    assert isinstance(only_event(await world.handle(mx_ok())), pb.MailSent), "the hand came back"


async def test_an_error_of_the_pool_leaves_the_claim_in_doubt(build: Callable[..., World]) -> None:
    world = build(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        await world.handle(mx_ok())
    assert world.row.state == "sending"


# --- cancels --------------------------------------------------------------------------------------


async def test_a_cancelled_task_is_not_sent_until_it_is_reopened(build: Callable[..., World]) -> None:
    world = build(SENT)
    assert await world.handle(cancelled()) == Done()
    assert await world.handle(mx_ok()) == Done()
    assert world.pool.mails == []
    assert isinstance(only_event(await world.handle(mx_ok(epoch=1))), pb.MailSent)


async def test_a_cancel_waits_for_a_running_send_and_stops_the_next_attempt(
    build: Callable[..., World],
) -> None:
    go = asyncio.Event()

    async def send(guard: Callable[[], bool]) -> replies.SendResult:
        await go.wait()
        return GREYLISTED

    world = build(send)
    first = asyncio.ensure_future(world.handle(mx_ok()))
    await until(lambda: bool(world.pool.mails))
    cancel = asyncio.ensure_future(world.handle(cancelled()))
    await until(lambda: world.claims.calls >= 2)
    assert not cancel.done()
    go.set()
    assert isinstance(await first, Retry)
    assert await cancel == Done()
    assert await world.handle(mx_ok(attempt=2)) == Done()
    assert len(world.pool.mails) == 1


async def test_a_cancelled_mail_in_doubt_is_published_as_uncertain(build: Callable[..., World]) -> None:
    world = build()
    world.someone_claims()
    world.claims.expire()
    event = only_event(await world.handle(cancelled()))
    assert isinstance(event, pb.MailFailed)
    assert event.uncertain
    assert only_event(await world.handle(mx_ok())) == event


async def test_a_shed_record_comes_back_as_the_same_attempt(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sender.slots.SHED_AFTER", 0.01)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.01)
    world = build()
    world.sender._attempts.claim_slots = Slots(1, 1, is_loaded=lambda: True)
    assert world.sender._attempts.claim_slots.acquire("b.test")
    waiting = [asyncio.ensure_future(world.handle(mx_ok(attempt=2))) for _ in range(3)]
    async with asyncio.timeout(30):
        await asyncio.wait(waiting[1:])
    for task in waiting[1:]:
        outcome = await task
        assert isinstance(outcome, Retry)
        assert not outcome.counts
        assert outcome.delay == DELAYS[0]
        assert outcome.due_at_ms >= NOW_US // 1000 + DELAYS[0] * 1000
        assert not outcome.events
    assert not world.claims.rows, "nothing is claimed for it"
    waiting[0].cancel()


async def test_most_of_72_mails_to_a_silent_domain_are_shed_without_saturation(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sender.slots.STALLED_AFTER", 0.3)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.02)
    answered = asyncio.Event()

    async def hang(guard: Callable[[], bool]) -> replies.SendResult:
        await answered.wait()
        return SENT

    world = build(*[hang] * 15, *[SENT] * 16)
    world.sender._attempts.claim_slots, world.sender._attempts.session_slots = (
        Slots(80, 60, is_loaded=lambda: False),
        Slots(20, 15),
    )
    ids = [number.to_bytes(16, "big") for number in range(1, 74)]
    records = [mx_ok(id=id_, domain="hangs.test") for id_ in ids[:72]]
    tasks = [asyncio.ensure_future(handle(world.sender, record)) for record in records]
    await until(lambda: len(world.pool.mails) == 15)
    quick = only_event(await world.handle(mx_ok(id=ids[72], domain="quick.test")))
    assert isinstance(quick, pb.MailSent)
    await until(lambda: sum(task.done() for task in tasks) == 42)
    worst = world.sender.domains()[0]
    assert worst[:4] == ("hangs.test", 15, 30, 0)
    assert worst.still_seconds > 0.3
    put_off = [task.result() for task in tasks if task.done()]
    assert all(isinstance(outcome, Retry) and not outcome.counts for outcome in put_off)
    answered.set()
    ended = [outcome for outcome in await asyncio.gather(*tasks) if not isinstance(outcome, Retry)]
    assert len(ended) == 30
    assert {type(only_event(outcome)) for outcome in ended} == {pb.MailSent}
    assert world.sender.domains() == []


async def test_a_claimed_mail_does_not_wait_for_a_stalled_domains_sessions(
    build: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.01)
    world = build()
    world.sender._attempts.session_slots = sessions = Slots(2, 1)
    assert sessions.acquire("b.test")
    first = asyncio.ensure_future(acquire(sessions, "b.test"))
    claimed = asyncio.ensure_future(world.handle(mx_ok(attempt=2)))
    # A domain that is stalled already is not even claimed.
    await until(lambda: bool(world.claims.rows))
    monkeypatch.setattr("services.sender.slots.STALLED_AFTER", 0.05)
    async with asyncio.timeout(30):
        outcome = await claimed
    assert isinstance(outcome, Retry)
    assert not outcome.counts
    assert {row.state for row in world.claims.rows.values()} == {"released"}, "nobody finds it in doubt"
    [domain] = world.sender.domains() or [None]
    assert domain is None, "nothing of it is in hand"
    # A record that arrives while the domain is stalled is not even claimed.
    world.claims.rows.clear()
    assert isinstance(await world.handle(mx_ok(attempt=2)), Retry)
    assert not world.claims.rows
    first.cancel()


async def test_the_stage_reads_and_decodes_its_topics(build: Callable[..., World]) -> None:
    made = stage(build().sender, DELAYS)
    assert made.name == "sender"
    assert set(made.topics) == set(made.decoders) == {MX_OK, TASK_CANCELLED}
    assert made.delays == DELAYS
    record = mx_ok()
    assert made.decoders[MX_OK](record.event.SerializeToString()) == record.event
