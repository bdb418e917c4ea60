"""The slots of catch-ups: each tenant has few of them, and tenants that wait get them in turn."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["CatchUpSlots"]


class CatchUpSlots:
    """`total` slots, of which one tenant holds `per_tenant` at most. Belongs to one event loop."""

    def __init__(self, total: int, per_tenant: int) -> None:
        self._free, self._per_tenant = total, per_tenant
        self._held = Counter[str]()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def hold(self, tenant: str) -> AsyncIterator[None]:
        """Hold a slot inside the `async with` block, once there is one for this tenant."""
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(granted)
        self._grant()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self._held[tenant] -= 1
                self._free += 1
                self._grant()

    def wanted(self, tenant: str) -> bool:
        """Return whether anyone waits for a slot that this tenant could release."""
        return any(self._may_have(other) or other == tenant for other in self._waiting if self._queue(other))

    def _grant(self) -> None:
        """Give free slots to the tenants that hold the fewest; of equals, to the one that waits longest."""
        while self._free:
            waiting = [tenant for tenant in list(self._waiting) if self._queue(tenant)]
            tenants = list(filter(self._may_have, waiting))
            if not tenants:
                return
            tenant = min(tenants, key=self._held.__getitem__)
            queue = self._waiting.pop(tenant)
            granted = queue.popleft()
            if queue:
                # Others have their turn first.
                self._waiting[tenant] = queue
            self._held[tenant] += 1
            self._free -= 1
            granted.set_result(None)

    def _may_have(self, tenant: str) -> bool:
        return self._held[tenant] < self._per_tenant

    def _queue(self, tenant: str) -> deque[asyncio.Future[None]]:
        """Return who of this tenant still waits."""
        queue = self._waiting[tenant]
        while queue and queue[0].done():
            queue.popleft()
        return queue
