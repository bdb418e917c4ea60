"""Chooses a deferred record's delay topic and its due time. Pure.

Each delay has a topic of its own, so its records are roughly in the order of their due times. By its jitter,
a record behind another one may be due before it, by up to a tenth of the delay.

head_holds.py has the reader's half: until when a partition's head holds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["JITTER", "choose_delay", "longest_wait"]

JITTER = 0.1
"""The part of a delay that jitter adds at most."""


def choose_delay(delays: Sequence[int], after: float, now_ms: int, rng: random.Random) -> tuple[int, int]:
    """Choose the delay topic for a record that is to come back in `after` seconds.

    Return the delay in seconds and the due time in Unix milliseconds. The delay is the shortest of the
    rising `delays` that is not below `after`, or else the longest. It is due after the whole delay and up to
    a tenth of it. The tenth keeps records that fail together from returning together. Raise ValueError when
    `delays` is empty.
    """
    if not delays:
        raise ValueError("no delays to choose from")
    delay = next((d for d in delays if d >= after), delays[-1])
    return delay, now_ms + round(delay * 1000 * (1 + rng.random() * JITTER))


def longest_wait(delay: int) -> float:
    """Return the longest that a record of this delay waits. Both are seconds."""
    return delay * (1 + JITTER)
