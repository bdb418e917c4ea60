"""Who may send next: a bounded number at once, the recipients' domains in turn."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from services.common.rate import Rate

__all__ = ["DomainSaturated", "SlotUse", "Slots", "domain_share"]

# How long (seconds) the first of a queue waits before that is a reason to leave: one that moves, however
# long, is worked off sooner than it could come back.
SHED_AFTER = 5.0
# How long (seconds) a domain that has all the slots it can get gets no other one before it stands still.
STALLED_AFTER = 30.0
_SHED_INTERVAL = 1.0
# Domains whose rates are remembered, before those that are at rest are forgotten.
_MOST_RATES = 10_000


class DomainSaturated(Exception):
    """The domain is slow and holds up the rest: come back later."""


class SlotUse(NamedTuple):
    """The domain's slots in use, its callers that wait, and the seconds since it got or gave back a slot."""

    domain: str
    used: int
    waiting: int
    still: float


class _SlotWaiter(NamedTuple):
    turn: asyncio.Future[None]
    since: float


def domain_share(sessions: int, per_domain: int) -> int:
    """Return how many of the sessions one domain may use: `per_domain`, but not all unless that is 0 (all).

    Where there are no more sessions than that, a domain gets three quarters of them: one that hangs would
    keep all others waiting.
    """
    return per_domain if per_domain < sessions else max(1, sessions * 3 // 4)


class Slots:
    """`total` slots at once, at most `per_domain` of them to one domain (0: no such bound).

    Domains that wait are served in turn, each one's callers in order: a thousand mails to a slow domain
    delay another domain's only mail by one turn, not by a thousand. A domain gets `rate` slots a second at
    most, a second's worth of them at once (0: no such bound). While it is `saturated`, the domains that have
    more than an equal share of the queue and whose first in line has waited for PATIENCE lose the later
    half of theirs, every second anew. So does, crowded or not, a domain that `is_stalled` still, down to one
    caller a slot. Belongs to one event loop.
    """

    def __init__(
        self,
        total: int,
        per_domain: int,
        *,
        rate: float = 0.0,
        saturated: Callable[[], bool] | None = None,
    ) -> None:
        self._free = total
        self._per_domain = per_domain or total
        self._used: dict[str, int] = {}
        # When a domain in use last got a slot or gave one back.
        self._moved: dict[str, float] = {}
        self._time: Callable[[], float] = time.monotonic
        # The domains that have callers waiting, in the order of their turns.
        self._waiting: dict[str, deque[_SlotWaiter]] = {}
        self._saturated = saturated
        self._rate = rate
        self._rates: dict[str, Rate] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._shed_timer: asyncio.TimerHandle | None = None

    async def acquire(self, domain: str) -> None:
        """Wait for a slot; every return needs one `release`. Raises Crowded."""
        loop = asyncio.get_running_loop()
        self._time = loop.time
        now = loop.time()
        if self._free and domain not in self._waiting and self._may_acquire(domain, now):
            self._take(domain, now)
            return
        waiter = _SlotWaiter(loop.create_future(), now)
        self._waiting.setdefault(domain, deque()).append(waiter)
        if self._free:
            self._wake_within(loop, self._rate_wait(domain, now))
        if self._shed_timer is None:
            self._shed_timer = loop.call_later(_SHED_INTERVAL, self._shed_load)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                self._leave(domain, waiter)
            elif waiter.turn.exception() is None:
                self.release(domain)
            raise

    def release(self, domain: str) -> None:
        """Give a slot back."""
        self._free += 1
        left = self._used[domain] - 1
        if left:
            self._used[domain] = left
            self._moved[domain] = asyncio.get_running_loop().time()
        else:
            del self._used[domain], self._moved[domain]
        self._serve()

    def is_stalled(self, domain: str) -> bool:
        """Tell whether all of the domain's slots have been in use for STANDSTILL, and as many callers wait.

        Those take all of the slots at once when the domain moves again; who waits behind them waits in vain.
        """
        used, waiting = self._used.get(domain, 0), len(self._waiting.get(domain, ()))
        full = used >= self._per_domain or not self._free
        return 0 < used <= waiting and full and self._still(domain) > STALLED_AFTER

    def held(self) -> list[SlotUse]:
        """Return the domains that have slots in use or callers waiting. Safe from any thread."""
        used, waiting = dict(self._used), dict(self._waiting)
        return [
            SlotUse(domain, used.get(domain, 0), len(waiting.get(domain, ())), self._still(domain))
            for domain in used.keys() | waiting.keys()
        ]

    def _still(self, domain: str) -> float:
        now = self._time()
        return max(0.0, now - self._moved.get(domain, now))

    def refund_rate(self, domain: str) -> None:
        """Have the slot that was taken last not count for the domain's rate: nothing was sent in it."""
        if domain in self._rates:
            self._rates[domain].undo()
            self._serve()

    def _may_acquire(self, domain: str, now: float) -> bool:
        return self._used.get(domain, 0) < self._per_domain and self._rate_wait(domain, now) <= 0

    def _take(self, domain: str, now: float) -> None:
        self._free -= 1
        self._used[domain] = self._used.get(domain, 0) + 1
        self._moved[domain] = now
        if self._rate:
            self._count_rate(domain, now)

    def _rate_wait(self, domain: str, now: float) -> float:
        """Return in how many seconds the domain's rate allows a slot; 0: at once."""
        rate = self._rates.get(domain)
        return rate.wait(now) if rate is not None else 0.0

    def _count_rate(self, domain: str, now: float) -> None:
        if domain not in self._rates:
            if len(self._rates) >= _MOST_RATES:
                self._rates = {name: rate for name, rate in self._rates.items() if not rate.is_idle(now)}
            self._rates[domain] = Rate(self._rate, burst=self._rate)
        self._rates[domain].took(now)

    def _leave(self, domain: str, waiter: _SlotWaiter) -> None:
        queue = self._waiting.get(domain)
        if queue and waiter in queue:  # else its turn came between its cancellation and now
            queue.remove(waiter)
            if not queue:
                del self._waiting[domain]

    def _serve(self) -> None:
        """Hand free slots to those whose turn it is. A domain at its bound keeps its place."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._free:
            domain = next((d for d in self._waiting if self._may_acquire(d, now)), None)
            if domain is None:
                self._wake_for_rates(loop, now)
                return
            queue = self._waiting.pop(domain)
            waiter = queue.popleft()
            if queue:
                self._waiting[domain] = queue
            if not waiter.turn.done():
                self._take(domain, now)
                waiter.turn.set_result(None)

    def _wake_for_rates(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Come back when the first domain that only its rate holds may go on."""
        if self._rate:
            waits = (wait for domain in self._waiting if (wait := self._rate_wait(domain, now)) > 0)
            self._wake_within(loop, min(waits, default=0.0))

    def _wake_within(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Come back in so many seconds, or sooner where a timer is set already; 0: no timer is needed."""
        if seconds <= 0 or (self._timer is not None and self._timer.when() <= loop.time() + seconds):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._serve_due)

    def _serve_due(self) -> None:
        self._timer = None
        self._serve()

    def _shed_load(self) -> None:
        loop = asyncio.get_running_loop()
        self._shed_timer = loop.call_later(_SHED_INTERVAL, self._shed_load) if self._waiting else None
        if not self._waiting:
            return
        saturated = self._saturated is not None and self._saturated()
        long_ago = loop.time() - SHED_AFTER
        domain_share = sum(map(len, self._waiting.values())) / len(self._waiting)
        for domain, queue in self._waiting.items():
            leave = 0
            if saturated and len(queue) >= max(2, domain_share) and queue[0].since < long_ago:
                leave = len(queue) // 2
            elif self.is_stalled(domain):
                leave = min(len(queue) // 2, len(queue) - self._used[domain])
            for _ in range(leave):
                turn = queue.pop().turn
                if not turn.done():
                    turn.set_exception(DomainSaturated())
