"""Who may send next: a bounded number at once, the recipients' domains in turn."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Slots"]


class Slots:
    """`total` slots at once, at most `per_domain` of them to one domain (0: no such bound).

    Domains that wait are served in turn, each one's callers in order: a thousand mails to a slow domain
    delay another domain's only mail by one turn, not by a thousand. Belongs to one event loop.
    """

    def __init__(self, total: int, per_domain: int) -> None:
        self._free = total
        self._per_domain = per_domain or total
        self._used: dict[str, int] = {}
        # The domains that have callers waiting, in the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, domain: str) -> None:
        """Wait for a slot; every return needs one `release`."""
        if self._free and self._used.get(domain, 0) < self._per_domain:
            self._take(domain)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(domain, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(domain, turn)
            else:
                self.release(domain)
            raise

    def release(self, domain: str) -> None:
        """Give a slot back."""
        self._free += 1
        left = self._used[domain] - 1
        if left:
            self._used[domain] = left
        else:
            del self._used[domain]
        self._serve()

    def _take(self, domain: str) -> None:
        self._free -= 1
        self._used[domain] = self._used.get(domain, 0) + 1

    def _leave(self, domain: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(domain)
        if queue and turn in queue:  # else its turn came between its cancellation and now
            queue.remove(turn)
            if not queue:
                del self._waiting[domain]

    def _serve(self) -> None:
        """Hand free slots to those whose turn it is. A domain at its bound keeps its place."""
        while self._free:
            domain = next((d for d in self._waiting if self._used.get(d, 0) < self._per_domain), None)
            if domain is None:
                return
            queue = self._waiting.pop(domain)
            turn = queue.popleft()
            if queue:
                self._waiting[domain] = queue
            if not turn.done():
                self._take(domain)
                turn.set_result(None)
