"""Slots that bound how many mails a sender has at a time, shared fairly among the recipients' domains."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from services.common.rate import Rate

__all__ = ["SlotUse", "SlotWaiter", "Slots", "domain_share"]

# Load shedding begins once a queue's first caller has waited this long (seconds). A queue that moves, however
# long, is served sooner than a deferred record would come back.
SHED_AFTER = 5.0
# A domain that has all slots it may have is stalled after this long (seconds) without a change.
STALLED_AFTER = 30.0
_SHED_INTERVAL = 1.0
# Above this number of domains, the rates of idle ones are dropped.
_MAX_RATES = 10_000


class SlotUse(NamedTuple):
    """What one domain uses of the slots."""

    domain: str
    used: int
    waiting: int
    """Callers that wait for a slot."""
    unchanged_seconds: float
    """Seconds since the domain last acquired or released a slot; 0 if it has none."""


class SlotWaiter:
    """A caller that waits for a slot of `domain`, since `since` (seconds of the loop's clock)."""

    __slots__ = ("_slots", "domain", "on_turn", "since")

    def __init__(self, slots: Slots, domain: str, on_turn: Callable[[bool], None], since: float) -> None:
        self._slots, self.domain, self.on_turn, self.since = slots, domain, on_turn, since

    def cancel(self) -> None:
        """Wait no more: `on_turn` is not called."""
        self._slots._leave(self)


def domain_share(sessions: int, per_domain: int) -> int:
    """Return how many of `sessions` one domain may use, given the setting `per_domain` (0: no limit).

    Where `per_domain` would be all sessions, a domain gets three quarters of them: one that hangs would
    otherwise keep all others waiting.
    """
    return per_domain if per_domain < sessions else max(1, sessions * 3 // 4)


class Slots:
    """`total` slots at a time, at most `per_domain` of them for one domain (0: no such bound).

    Waiting domains take turns, and each domain's callers are served in order. So a thousand mails to a slow
    domain delay another domain's only mail by one turn. `rate` bounds the slots that a domain gets a second,
    with bursts of one second's worth (0: no such bound).

    Once a second, while `is_loaded()` is true, load is shed: a domain's later half of callers get no slot.
    That concerns a domain with more than an equal share of the queue, whose first caller has
    waited for SHED_AFTER. A stalled domain (`is_stalled`) is shed at any time, down to one caller a slot.

    Belongs to one event loop.
    """

    def __init__(
        self,
        total: int,
        per_domain: int,
        *,
        rate: float = 0.0,
        is_loaded: Callable[[], bool] | None = None,
    ) -> None:
        self._free = total
        self._per_domain = per_domain or total
        self._used: dict[str, int] = {}
        # When each domain with slots last acquired or released one.
        self._changed_at: dict[str, float] = {}
        self._clock: Callable[[], float] | None = None
        # The domains with waiting callers, in the order of their turns.
        self._waiting: dict[str, deque[SlotWaiter]] = {}
        self._serving = False
        self._is_loaded = is_loaded
        self._rate = rate
        self._rates: dict[str, Rate] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._shed_timer: asyncio.TimerHandle | None = None

    def acquire(self, domain: str) -> bool:
        """Take a slot if the domain may have one now, and return whether. The caller must `release` it."""
        if not self._free or domain in self._waiting or self._used.get(domain, 0) >= self._per_domain:
            return False
        now = self._now()
        if self._rate and self._rate_wait(domain, now) > 0:
            return False
        self._take(domain, now)
        return True

    def wait(self, domain: str, on_turn: Callable[[bool], None]) -> SlotWaiter:
        """Have `on_turn` called once with True when the caller has a slot, or with False if it is shed.

        Call this after `acquire` returned False. `on_turn` may acquire and release slots, and must not raise.
        """
        now = self._now()
        waiter = SlotWaiter(self, domain, on_turn, now)
        queue = self._waiting.get(domain)
        if queue is None:
            queue = self._waiting[domain] = deque()
        queue.append(waiter)
        if self._free and self._rate:
            self._wake_within(asyncio.get_running_loop(), self._rate_wait(domain, now))
        if self._shed_timer is None:
            self._shed_timer = asyncio.get_running_loop().call_later(_SHED_INTERVAL, self._shed_load)
        return waiter

    def release(self, domain: str) -> None:
        """Release one slot of the domain."""
        self._free += 1
        left = self._used[domain] - 1
        if left:
            self._used[domain] = left
            self._changed_at[domain] = self._now()
        else:
            del self._used[domain], self._changed_at[domain]
        if self._waiting:
            self._serve()

    def is_stalled(self, domain: str) -> bool:
        """Return whether all of the domain's slots were in use for STALLED_AFTER, and as many callers wait.

        When the domain moves again, those callers take all of its slots; a later one would wait in vain.
        """
        if domain not in self._waiting:
            return False
        used, waiting = self._used.get(domain, 0), len(self._waiting[domain])
        full = used >= self._per_domain or not self._free
        return 0 < used <= waiting and full and self._unchanged_seconds(domain) > STALLED_AFTER

    def usage(self) -> list[SlotUse]:
        """Return the domains that have slots or waiting callers. Safe on any thread."""
        used, waiting = dict(self._used), dict(self._waiting)
        return [
            SlotUse(
                domain, used.get(domain, 0), len(waiting.get(domain, ())), self._unchanged_seconds(domain)
            )
            for domain in used.keys() | waiting.keys()
        ]

    def _now(self) -> float:
        clock = self._clock
        if clock is None:
            clock = self._clock = asyncio.get_running_loop().time
        return clock()

    def _unchanged_seconds(self, domain: str) -> float:
        now = self._clock() if self._clock is not None else 0.0
        return max(0.0, now - self._changed_at.get(domain, now))

    def refund_rate(self, domain: str) -> None:
        """Uncount one slot of the domain's rate: its caller sent nothing."""
        if domain in self._rates:
            self._rates[domain].undo()
            self._serve()

    def _may_acquire(self, domain: str, now: float) -> bool:
        return self._used.get(domain, 0) < self._per_domain and not (
            self._rate and self._rate_wait(domain, now) > 0
        )

    def _take(self, domain: str, now: float) -> None:
        self._free -= 1
        self._used[domain] = self._used.get(domain, 0) + 1
        self._changed_at[domain] = now
        if self._rate:
            self._count_rate(domain, now)

    def _rate_wait(self, domain: str, now: float) -> float:
        """Return the seconds until the domain's rate allows a slot; 0: now."""
        rate = self._rates.get(domain)
        return rate.wait(now) if rate is not None else 0.0

    def _count_rate(self, domain: str, now: float) -> None:
        if domain not in self._rates:
            if len(self._rates) >= _MAX_RATES:
                self._rates = {name: rate for name, rate in self._rates.items() if not rate.is_idle(now)}
            self._rates[domain] = Rate(self._rate, burst=self._rate)
        self._rates[domain].took(now)

    def _leave(self, waiter: SlotWaiter) -> None:
        queue = self._waiting.get(waiter.domain)
        if queue and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[waiter.domain]

    def _serve(self) -> None:
        """Give free slots to the callers whose turn it is. A domain at its bound keeps its turn."""
        # A caller may release slots in its turn; the loop below then sees them.
        if self._serving:
            return
        self._serving = True
        try:
            while self._free and self._waiting:
                now = self._now()
                for domain in self._waiting:
                    if self._may_acquire(domain, now):
                        break
                else:
                    self._wake_for_rates(asyncio.get_running_loop(), now)
                    return
                queue = self._waiting.pop(domain)
                waiter = queue.popleft()
                if queue:
                    self._waiting[domain] = queue
                self._take(domain, now)
                waiter.on_turn(True)
        finally:
            self._serving = False

    def _wake_for_rates(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Set a timer for the first domain that waits only for its rate."""
        if self._rate:
            waits = (wait for domain in self._waiting if (wait := self._rate_wait(domain, now)) > 0)
            self._wake_within(loop, min(waits, default=0.0))

    def _wake_within(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        """Have `_serve` run within so many seconds; 0: no timer is needed."""
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
        is_loaded = self._is_loaded is not None and self._is_loaded()
        long_ago = loop.time() - SHED_AFTER
        domain_share = sum(map(len, self._waiting.values())) / len(self._waiting)
        shed: list[SlotWaiter] = []
        for domain, queue in self._waiting.items():
            leave = 0
            if is_loaded and len(queue) >= max(2, domain_share) and queue[0].since < long_ago:
                leave = len(queue) // 2
            elif self.is_stalled(domain):
                leave = min(len(queue) // 2, len(queue) - self._used[domain])
            shed += [queue.pop() for _ in range(leave)]
        for waiter in shed:
            waiter.on_turn(False)
