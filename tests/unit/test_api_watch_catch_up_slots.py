"""The slots of catch-ups: a tenant that holds all it may have keeps no other from catching up."""

from __future__ import annotations

import asyncio

import pytest

from services.api.watch.catch_up_slots import CatchUpSlots


class Holder:
    """Holds a slot of a tenant from when there is one until `release`."""

    def __init__(self, slots: CatchUpSlots, tenant: str) -> None:
        self.holds = False
        self._done = asyncio.Event()
        self._task = asyncio.create_task(self._run(slots, tenant))

    async def _run(self, slots: CatchUpSlots, tenant: str) -> None:
        async with slots.hold(tenant):
            self.holds = True
            await self._done.wait()

    async def release(self) -> None:
        self._done.set()
        await self._task
        await asyncio.sleep(0)

    async def cancel(self) -> None:
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task


async def holders(slots: CatchUpSlots, *tenants: str) -> list[Holder]:
    made = [Holder(slots, tenant) for tenant in tenants]
    for _ in range(3):
        await asyncio.sleep(0)
    return made


def held(some: list[Holder]) -> list[bool]:
    return [holder.holds for holder in some]


async def test_one_tenant_holds_half_of_the_slots_at_most() -> None:
    slots = CatchUpSlots(8, 4)
    noisy = await holders(slots, *["noisy"] * 20)
    assert held(noisy) == [True] * 4 + [False] * 16
    assert slots.wanted("noisy")
    assert not slots.wanted("quiet")
    [quiet] = await holders(slots, "quiet")
    assert quiet.holds


async def test_waiting_tenants_get_free_slots_in_turn() -> None:
    slots = CatchUpSlots(2, 2)
    first = await holders(slots, "a", "a")
    waiting = await holders(slots, "a", "a", "b", "c", "b")
    assert slots.wanted("a")
    await first[0].release()
    assert held(waiting) == [False, False, True, False, False]
    await waiting[2].release()
    assert held(waiting) == [False, False, True, True, False]


async def test_a_cancelled_waiter_takes_no_slot_and_a_cancelled_holder_releases_its_own() -> None:
    slots = CatchUpSlots(1, 1)
    holder, gone, waiter = await holders(slots, "a", "a", "b")
    await gone.cancel()
    assert (holder.holds, waiter.holds) == (True, False)
    await holder.cancel()
    await asyncio.sleep(0)
    assert waiter.holds
    await waiter.release()
    assert not slots.wanted("a")
    assert (await holders(slots, "a"))[0].holds
