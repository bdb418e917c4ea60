"""The validator's handler, with plain records and a cache whose lookups end when the test says so."""

import asyncio
from collections.abc import Sequence

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.kafka.topics import TASK_CREATED
from services.common.stage.types import Done, Outcome, Record, Retry
from services.validator.cache import VerdictCache
from services.validator.mx import Reason, Verdict, VerdictKind
from services.validator.stage import Validator, stage

ID = bytes(range(16))
NOW_US = 1_700_000_000_000_001
OK = Verdict(VerdictKind.OK, None, ((10, "mx1.test"), (20, "mx2.test")), "", 60)
NULL = Verdict(VerdictKind.FAILED, Reason.NULL_MX, (), "a.test takes no mail", 30)
DARK = Verdict(VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, (), "MX of a.test: SERVFAIL", 30)
TASK = pb.MailTask(
    id=ID,
    tenant="t",
    idempotency_key="k",
    email="someone@a.test",
    domain="a.test",
    subject="Hello",
    body="text",
    html="<p>text</p>",
    headers={"X-One": "1"},
    labels={"team": "red"},
    created_at_us=5,
)


class Dns:
    """Returns `verdict` for every domain, and remembers the calls."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.asked: list[str] = []

    async def __call__(self, domain: str, fresh: bool) -> Verdict:
        self.asked.append(domain)
        await asyncio.sleep(0)
        return self.verdict


def build(verdict: Verdict, delays: Sequence[int] = (5, 30)) -> tuple[Validator, VerdictCache, Dns]:
    dns = Dns(verdict)
    cache = VerdictCache(dns, lambda: 0.0)
    return Validator(cache, delays, lambda: NOW_US), cache, dns


def record(attempt: int = 1, epoch: int = 7, task: pb.MailTask = TASK) -> Record:
    return Record(TASK_CREATED, ID, pb.TaskCreated(task=task, epoch=epoch, at_us=9), attempt)


async def outcome(validator: Validator, what: Record) -> Outcome:
    finished: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def finish(outcomes: Sequence[tuple[Record, Outcome | Exception]]) -> None:
        [(of, found)] = outcomes
        assert of is what
        if isinstance(found, Exception):
            finished.set_exception(found)
        else:
            finished.set_result(found)

    validator.start([what], finish)
    return await asyncio.wait_for(finished, 30)


def opened_again(at_us: int) -> Record:
    return Record(TASK_CREATED, ID, pb.TaskCreated(task=TASK, epoch=at_us // 1000, at_us=at_us))


async def test_a_reopened_task_asks_dns_whatever_is_cached() -> None:
    validator, cache, dns = build(NULL)
    first = await outcome(validator, record(epoch=0))
    assert isinstance(first, Done)
    assert isinstance(first.events[0], pb.MxFailed)
    # The domain is repaired; a task in its first epoch still gets the cached verdict.
    dns.verdict = OK
    assert await outcome(validator, record(epoch=0)) == first
    again = await outcome(validator, opened_again(NOW_US - 1_000_000))
    assert isinstance(again, Done)
    assert isinstance(again.events[0], pb.MxOk)
    assert len(dns.asked) == 2
    # Tasks reopened before that lookup need no other one; tasks reopened later do.
    await outcome(validator, opened_again(NOW_US - 2_000_000))
    assert len(dns.asked) == 2
    assert cache.get("a.test") is OK


async def test_a_task_reopened_by_a_clock_ahead_asks_dns() -> None:
    validator, _, dns = build(NULL)
    await outcome(validator, record(epoch=0))
    await outcome(validator, opened_again(NOW_US + 5_000_000))
    assert len(dns.asked) == 2


async def test_ok_carries_the_whole_task_and_the_hosts() -> None:
    validator, _, _ = build(OK)
    hosts = [pb.MailHost(preference=10, name="mx1.test"), pb.MailHost(preference=20, name="mx2.test")]
    assert await outcome(validator, record(attempt=3)) == Done(
        [pb.MxOk(task=TASK, epoch=7, attempt=3, hosts=hosts, at_us=NOW_US)]
    )


async def test_ok_carries_the_time_of_a_scheduled_task() -> None:
    validator, _, _ = build(OK)
    event = pb.TaskCreated(task=TASK, at_us=9, send_at_us=77)
    done = await outcome(validator, Record(TASK_CREATED, ID, event, 1))
    assert isinstance(done, Done)
    [ok] = done.events
    assert isinstance(ok, pb.MxOk)
    assert ok.send_at_us == 77


async def test_failed_says_why() -> None:
    validator, _, _ = build(NULL)
    assert await outcome(validator, record()) == Done(
        [
            pb.MxFailed(
                id=ID, epoch=7, attempt=1, reason="null_mx", detail="a.test takes no mail", at_us=NOW_US
            )
        ]
    )


class Finished(list[list[tuple[Record, Outcome | Exception]]]):
    """The calls of `finish`."""

    def __call__(self, outcomes: Sequence[tuple[Record, Outcome | Exception]]) -> None:
        self.append(list(outcomes))

    @property
    def records(self) -> set[Record]:
        return {record for call in self for record, _ in call}


@pytest.mark.parametrize("verdict", [OK, NULL, DARK])
async def test_known_verdicts_are_answered_at_once_and_together(verdict: Verdict) -> None:
    validator, cache, dns = build(verdict)
    await cache.resolve("a.test")
    records, finished = [record(epoch=0) for _ in range(5)], Finished()
    validator.start(records, finished)
    [answer] = finished
    assert [of for of, _ in answer] == records
    assert all(isinstance(found, Done | Retry) for _, found in answer)
    assert dns.asked == ["a.test"]


async def test_records_of_one_domain_wait_for_one_lookup_and_hold_up_no_others() -> None:
    validator, cache, dns = build(OK)
    await cache.resolve("a.test")
    known = record(epoch=0)
    other = pb.MailTask(id=ID, email="x@b.test", domain="b.test")
    waiting, finished = [record(epoch=0, task=other) for _ in range(3)], Finished()
    validator.start([waiting[0], known, *waiting[1:]], finished)
    assert finished.records == {known}
    await asyncio.gather(*validator._lookups)
    assert finished.records == {known, *waiting}
    assert dns.asked == ["a.test", "b.test"]


async def test_a_lookup_that_fails_or_is_cancelled_leaves_no_record_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.validator.stage._RESTART_PAUSE", 0.0)
    ends: list[BaseException | None] = [asyncio.CancelledError(), None, ValueError("a defect")]

    async def lookup(domain: str, fresh: bool) -> Verdict:
        end = ends.pop(0)
        if end is not None:
            raise end
        return OK

    validator = Validator(VerdictCache(lookup, lambda: 0.0), (), lambda: NOW_US)
    assert isinstance(await outcome(validator, record(epoch=0)), Done)
    with pytest.raises(ValueError, match="a defect"):
        await outcome(validator, record(task=pb.MailTask(id=ID, domain="b.test")))


async def test_a_transient_verdict_uses_each_delay_once_and_then_fails() -> None:
    validator, _, _ = build(DARK, (5, 30))
    for attempt, delay in ((1, 5), (2, 30)):
        due_at_ms = 1_700_000_000_001 + delay * 1000
        deferred = pb.MailDeferred(
            id=ID,
            epoch=7,
            attempt=attempt,
            stage="validator",
            reason="dns_unavailable",
            next_attempt_at_us=due_at_ms * 1000,
            at_us=NOW_US,
        )
        assert await outcome(validator, record(attempt)) == Retry(delay, due_at_ms, DARK.detail, [deferred])
    failed = pb.MxFailed(
        id=ID, epoch=7, attempt=3, reason="dns_unavailable", detail=DARK.detail, at_us=NOW_US
    )
    assert await outcome(validator, record(3)) == Done([failed])


async def test_a_retry_is_never_due_before_its_delay_is_over() -> None:
    validator, _, _ = build(DARK, (5,))
    retry = await outcome(validator, record())
    assert isinstance(retry, Retry)
    assert retry.due_at_ms * 1000 >= NOW_US + 5_000_000


async def test_an_attempt_beyond_the_present_delays_fails_at_once() -> None:
    validator, _, _ = build(DARK, (5,))
    assert isinstance(await outcome(validator, record(attempt=9)), Done)


async def test_without_delays_a_transient_verdict_fails_at_once() -> None:
    validator, _, _ = build(DARK, ())
    assert isinstance(await outcome(validator, record()), Done)


async def test_a_task_recorded_without_its_domain_is_judged_by_its_address() -> None:
    validator, _, dns = build(OK)
    done = await outcome(validator, record(task=pb.MailTask(id=ID, email="x@Bücher.test")))
    assert isinstance(done, Done)
    assert isinstance(done.events[0], pb.MxOk)
    assert dns.asked == ["xn--bcher-kva.test"]


async def test_a_task_with_no_domain_at_all_fails() -> None:
    validator, _, dns = build(OK)
    done = await outcome(validator, record(task=pb.MailTask(id=ID)))
    assert isinstance(done, Done)
    (event,) = done.events
    assert isinstance(event, pb.MxFailed)
    assert event.reason == "no_such_domain"
    assert dns.asked == []


async def test_a_cancelled_record_gets_no_outcome() -> None:
    validator, _, _ = build(OK)
    gone, kept, finished = record(epoch=0), record(epoch=0), Finished()
    validator.start([gone, kept], finished)
    validator.cancel([gone])
    alone, other = record(epoch=0, task=pb.MailTask(id=ID, domain="b.test")), Finished()
    validator.start([alone], other)
    validator.cancel([alone])
    await asyncio.gather(*validator._lookups, return_exceptions=True)
    assert (finished.records, other.records) == ({kept}, set())


async def test_the_stage_reads_task_created_and_owns_its_delays() -> None:
    _, cache, _ = build(OK)
    made = stage(cache, (5, 30))
    assert (made.name, tuple(made.topics), tuple(made.delays)) == ("validator", (TASK_CREATED,), (5, 30))
    event = made.decoders[TASK_CREATED](pb.TaskCreated(task=TASK).SerializeToString())
    assert event == pb.TaskCreated(task=TASK)
