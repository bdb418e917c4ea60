"""Slots: never more than allowed, none lost, each domain in its turn."""

import asyncio
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from services.sender.slots import Slots


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_flood_to_one_domain_delays_another_by_one_turn() -> None:
    slots, order = Slots(1, 0), []
    await slots.acquire("first")

    async def wait(domain: str) -> None:
        await slots.acquire(domain)
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


async def test_a_domain_at_its_bound_leaves_the_rest_to_others() -> None:
    slots = Slots(5, 3)
    for _ in range(3):
        await slots.acquire("slow")
    waiting = asyncio.ensure_future(slots.acquire("slow"))
    await settle()
    await asyncio.wait_for(slots.acquire("quick"), 1)
    await asyncio.wait_for(slots.acquire("quick"), 1)
    assert not waiting.done()
    slots.release("quick")
    await settle()
    assert not waiting.done(), "a free slot is no reason to exceed the domain's bound"
    slots.release("slow")
    await asyncio.wait_for(waiting, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 1 << 30))
def test_no_slot_is_lost_or_made_whoever_is_cancelled_when(total: int, bound: int, seed: int) -> None:
    async def run() -> None:
        rng = random.Random(seed)
        slots = Slots(total, bound)
        used: Counter[str] = Counter()
        most: Counter[str] = Counter()
        peak = 0

        async def work(domain: str) -> None:
            nonlocal peak
            await slots.acquire(domain)
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
        # All are back: as many as there ever were can be had at once, and no more.
        for number in range(total):
            await asyncio.wait_for(slots.acquire(f"domain {number}"), 1)
        one_more = asyncio.ensure_future(slots.acquire("one more"))
        await settle()
        assert not one_more.done()
        one_more.cancel()

    asyncio.run(run())
