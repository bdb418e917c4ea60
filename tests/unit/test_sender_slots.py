"""Slots: their bounds hold, none is lost, and the domains take turns."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.sender.slots import Slots, domain_share
from tests.slot_callers import DomainSaturated, acquire


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_flood_to_one_domain_delays_another_by_one_turn() -> None:
    slots, order = Slots(1, 0), []
    await acquire(slots, "first")

    async def wait(domain: str) -> None:
        await acquire(slots, domain)
        order.append(domain)

    tasks = [asyncio.ensure_future(wait("flood")) for _ in range(50)]
    await settle()
    tasks.append(asyncio.ensure_future(wait("other")))
    await settle()
    slots.release("first")
    await settle()
    assert order == ["flood"]
    slots.release("flood")
    await settle()
    assert order == ["flood", "other"]
    for domain in ("other", *["flood"] * 49):
        slots.release(domain)
        await settle()
    await asyncio.gather(*tasks)
    assert Counter(order) == {"flood": 50, "other": 1}


async def test_a_domain_at_its_bound_leaves_the_other_slots_to_others() -> None:
    slots = Slots(5, 3)
    for _ in range(3):
        await acquire(slots, "slow")
    waiting = asyncio.ensure_future(acquire(slots, "slow"))
    await settle()
    await asyncio.wait_for(acquire(slots, "quick"), 10)
    await asyncio.wait_for(acquire(slots, "quick"), 10)
    assert not waiting.done()
    slots.release("quick")
    await settle()
    assert not waiting.done(), "a free slot is no reason to exceed the domain's bound"
    slots.release("slow")
    await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize(
    ("sessions", "per_domain", "expected"),
    [(20, 15, 15), (16, 15, 15), (15, 15, 11), (10, 15, 7), (4, 15, 3), (2, 15, 1), (1, 15, 1), (10, 0, 0)],
)
async def test_a_domain_that_hangs_takes_no_more_than_three_quarters_of_few_sessions(
    sessions: int, per_domain: int, expected: int
) -> None:
    assert domain_share(sessions, per_domain) == expected
    if not expected or sessions == 1:
        return
    slots = Slots(sessions, domain_share(sessions, per_domain))
    hanging = [asyncio.ensure_future(acquire(slots, "slow")) for _ in range(3 * sessions)]
    await settle()
    await asyncio.wait_for(acquire(slots, "quick"), 10)
    for one in hanging:
        one.cancel()
    await asyncio.wait(hanging)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 1 << 30))
def test_cancelled_callers_neither_lose_nor_add_a_slot(total: int, bound: int, seed: int) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        slots = Slots(total, bound)
        used: Counter[str] = Counter()
        most: Counter[str] = Counter()
        peak = 0

        async def work(domain: str) -> None:
            nonlocal peak
            await acquire(slots, domain)
            try:
                used[domain] += 1
                most[domain] = max(most[domain], used[domain])
                peak = max(peak, sum(used.values()))
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                used[domain] -= 1
                slots.release(domain)

        tasks = []
        for _ in range(80):
            tasks.append(asyncio.ensure_future(work(rng.choice("abc"))))
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert peak <= total
        assert max(most.values(), default=0) <= (bound or total)
        # All slots are released: exactly as many as before can be acquired at once.
        for number in range(total):
            await asyncio.wait_for(acquire(slots, f"domain {number}"), 10)
        one_more = asyncio.ensure_future(acquire(slots, "one more"))
        await settle()
        assert not one_more.done()
        one_more.cancel()

    asyncio.run(run())


async def test_a_rate_allows_one_seconds_burst_and_then_one_at_a_time() -> None:
    loop = asyncio.get_running_loop()
    slots = Slots(100, 0, rate=20)
    start = loop.time()
    times = []

    async def one(domain: str) -> None:
        await acquire(slots, domain)
        times.append((domain, loop.time() - start))
        slots.release(domain)

    await asyncio.gather(*(one("limited") for _ in range(30)), one("other"))
    assert next(t for domain, t in times if domain == "other") < 0.2, "another domain has a rate of its own"
    limited = [t for domain, t in times if domain == "limited"]
    assert len(limited) == 30
    assert limited[19] < 0.2, "what a second allows may go at once"
    for number in range(20, 30):
        assert limited[number] >= (number - 19) / 20 - 0.01, "never faster than the rate"
    assert limited[29] < 2


async def test_a_slow_domains_callers_are_shed_while_the_stage_is_saturated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sender.slots.SHED_AFTER", 0.1)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.05)
    full = True
    slots = Slots(2, 1, is_loaded=lambda: full)
    await acquire(slots, "hangs")
    waiting = [asyncio.ensure_future(acquire(slots, "hangs")) for _ in range(50)]
    await asyncio.wait_for(acquire(slots, "quick"), 10)
    quick = asyncio.ensure_future(acquire(slots, "quick"))
    async with asyncio.timeout(30):
        await asyncio.wait(waiting[13:])
    full = False
    assert not quick.done(), "a lone mail of another domain is no crowd"
    left = [task for task in waiting if not task.done()]
    assert 1 <= len(left) <= 13
    assert left == waiting[: len(left)], "the first in line stay"
    assert all(isinstance(task.exception(), DomainSaturated) for task in waiting[len(left) :])
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in left), "where there is room nobody leaves"
    slots.release("quick")
    await asyncio.wait_for(quick, 10)
    for task in left:
        slots.release("hangs")
        await asyncio.wait_for(task, 10)


async def test_a_domain_waits_for_its_own_rate_whatever_another_waits_for() -> None:
    slots = Slots(10, 0, rate=1)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await acquire(slots, "first")
    await asyncio.sleep(0.6)
    await acquire(slots, "second")
    turns: dict[str, float] = {}

    async def take(domain: str) -> None:
        await acquire(slots, domain)
        turns[domain] = loop.time() - started

    # The caller with the later turn asks first.
    await asyncio.gather(take("second"), take("first"))
    assert turns["first"] < 1.4
    assert turns["second"] > 1.5


async def test_a_slot_in_which_nothing_was_sent_does_not_count_for_the_rate() -> None:
    slots = Slots(10, 0, rate=0.01)
    await acquire(slots, "slow")
    waiting = asyncio.ensure_future(acquire(slots, "slow"))
    await asyncio.sleep(0)
    slots.refund_rate("slow")
    await asyncio.wait_for(waiting, 10)
    slots.release("slow")
    more = asyncio.ensure_future(acquire(slots, "slow"))
    await asyncio.sleep(0)
    assert not more.done(), "the second one was sent"
    more.cancel()


async def test_a_long_queue_that_moves_is_not_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sender.slots.SHED_AFTER", 0.5)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.02)
    slots = Slots(4, 0, is_loaded=lambda: True)

    async def one() -> None:
        await acquire(slots, "busy")
        await asyncio.sleep(0.001)
        slots.release("busy")

    await asyncio.gather(*(one() for _ in range(300)))


async def test_a_stalled_domain_is_shed_before_the_stage_is_saturated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sender.slots.STALLED_AFTER", 0.2)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.02)
    slots = Slots(5, 3)
    for _ in range(3):
        await acquire(slots, "hangs")
    waiting = [asyncio.ensure_future(acquire(slots, "hangs")) for _ in range(12)]
    await asyncio.wait_for(acquire(slots, "quick"), 10)
    assert not slots.is_stalled("hangs"), "it has moved just now"
    async with asyncio.timeout(30):
        await asyncio.wait(waiting[3:])
    assert all(isinstance(task.exception(), DomainSaturated) for task in waiting[3:])
    assert not any(task.done() for task in waiting[:3]), "one a slot stays, for when the domain moves"
    assert slots.is_stalled("hangs")
    assert not slots.is_stalled("quick")
    [hangs] = [held for held in slots.usage() if held.domain == "hangs"]
    assert (hangs.used, hangs.waiting) == (3, 3)
    assert hangs.unchanged_seconds > 0.2
    for task in waiting[:3]:
        slots.release("hangs")
        await asyncio.wait_for(task, 10)
    assert not slots.is_stalled("hangs")


async def test_a_domain_that_moves_or_waits_for_its_rate_is_not_stalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sender.slots.STALLED_AFTER", 1)
    monkeypatch.setattr("services.sender.slots._SHED_INTERVAL", 0.01)
    slots = Slots(4, 2, rate=0.01)
    await acquire(slots, "limited")
    limited = [asyncio.ensure_future(acquire(slots, "limited")) for _ in range(5)]
    busy = Slots(1, 1)

    async def one() -> None:
        await acquire(busy, "busy")
        await asyncio.sleep(0.02)
        busy.release("busy")

    await asyncio.gather(*(one() for _ in range(60)))
    assert not any(task.done() for task in limited)
    assert not slots.is_stalled("limited")
    for task in limited:
        task.cancel()
