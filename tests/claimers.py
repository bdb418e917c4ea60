"""Claims the same tasks at once from many threads and processes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from services.common.database.engine import make_engine
from services.common.deliveries.decide import Claim, Taken, Wait
from services.common.deliveries.rows import owner_tokens
from services.sender.claims import Claims

__all__ = ["claim_all", "everyone"]


def everyone(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run `work` on `count` threads that start together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def claim_all(url: str, ids: list[bytes], seed: int, threads: int) -> list[bytes]:
    """Claim all ids in random batches on several threads; return the taken ones, one entry for each claim."""
    engine = make_engine(url, pool_size=threads)
    claims, mine = Claims(engine, 60, hold=False), owner_tokens()

    def work(number: int) -> list[bytes]:
        rng = random.Random(seed * 100 + number)
        left = rng.sample(ids, len(ids))
        won = []
        while left:
            size = rng.randrange(1, 80)
            batch, left = left[:size], left[size:]
            verdicts = claims.claim([Claim(i, 0, 1, mine(), "<id@a.test>") for i in batch])
            assert all(isinstance(verdict, Taken | Wait) for verdict in verdicts)
            won += [i for i, verdict in zip(batch, verdicts, strict=True) if isinstance(verdict, Taken)]
        return won

    try:
        return [task_id for won in everyone(threads, work) for task_id in won]
    finally:
        engine.dispose()
