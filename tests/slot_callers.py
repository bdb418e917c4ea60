"""A caller of the sender's slots that waits in a coroutine."""

from __future__ import annotations

import asyncio

from services.sender.slots import Slots

__all__ = ["DomainSaturated", "acquire"]


class DomainSaturated(Exception):
    """The caller was shed."""


async def acquire(slots: Slots, domain: str) -> None:
    """Wait for a slot. Raises DomainSaturated if the caller is shed. Cancelled, it holds none."""
    if slots.acquire(domain):
        return
    turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def on_turn(granted: bool) -> None:
        if not turn.cancelled():
            turn.set_result(granted)
        elif granted:
            slots.release(domain)

    waiter = slots.wait(domain, on_turn)
    try:
        granted = await turn
    except asyncio.CancelledError:
        if turn.cancelled():
            waiter.cancel()
        elif turn.result():
            slots.release(domain)
        raise
    if not granted:
        raise DomainSaturated
