"""Long loops on the event loop, in turns with everything else that waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

__all__ = ["MAX_BLOCKING", "in_turns"]

T = TypeVar("T")

MAX_BLOCKING = 0.002
"""Seconds for which a batch may use the event loop at a stretch. Single Creates wait for as long."""


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items. Others have their turn whenever the caller has used the loop for MAX_BLOCKING."""
    end = time.monotonic() + MAX_BLOCKING
    for item in items:
        if time.monotonic() > end:
            await asyncio.sleep(0)
            end = time.monotonic() + MAX_BLOCKING
        yield item
