"""When a record comes back.

One topic per delay keeps its records roughly in the order of their due times, so that only the head
of each partition has to be watched. Roughly: the jitter lets a record fall due up to a tenth of the
delay before the head, and then it waits for it. Late is allowed, early never. Pure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["credible", "look_again", "schedule"]

_JITTER = 0.1


def schedule(delays: Sequence[int], after: float, now_ms: int, rng: random.Random) -> tuple[int, int]:
    """Choose the delay topic for something to be done in `after` seconds.

    Returns the delay in seconds (the shortest of `delays` that is not below `after`, or the longest)
    and the due time in Unix milliseconds: a full delay from `now_ms`, plus up to a tenth, so that what
    failed together does not return together. `delays` are rising; raises ValueError when empty.
    """
    if not delays:
        raise ValueError("no delays to choose from")
    delay = next((d for d in delays if d >= after), delays[-1])
    return delay, now_ms + round(delay * 1000 * (1 + rng.random() * _JITTER))


def look_again(due_at_ms: int, delay: int) -> int:
    """Return when (Unix ms) to read a held partition again, whose head is due at `due_at_ms`.

    A little late (a fiftieth of the delay, a second at most), so that one reading finds all that fell
    due close together: each costs a fetch.
    """
    return due_at_ms + min(1000, delay * 20)


def credible(due_at_ms: int, delay: int, now_ms: int) -> bool:
    """Return whether a record on this delay's topic can have this due time.

    One that lies further off than twice the delay and a minute for the clocks' differences was not
    written by `schedule`, and would stop its partition until then.
    """
    return due_at_ms <= now_ms + 2000 * delay + 60_000
