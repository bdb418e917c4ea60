"""Reads and writes of a call, each with a deadline, so that nothing waits for a client for long."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc

from services.api.errors import overloaded, slow_request
from services.api.time_limit import TimeLimit

__all__ = ["READ_TIMEOUT", "WRITE_TIMEOUT", "Context", "StreamWriter", "read"]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

READ_TIMEOUT = 60.0
"""Seconds that a client has for a request. The longest has 32 MiB."""
WRITE_TIMEOUT = 20.0
"""Seconds in which a client must read one message of a stream."""


async def read(context: Context, limit: TimeLimit) -> bytes | None:
    """Return the next message of a call, None at its end; raise StatusError where none comes in time."""
    try:
        with limit.block():
            message = await context.read()
    except TimeoutError:
        raise slow_request() from None
    return None if message is grpc.aio.EOF else message


class StreamWriter:
    """Writes serialized messages to a stream."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._has_begun = False

    async def write(self, message: bytes) -> None:
        """Write a message, however long the client takes to read it.

        If this is cancelled, the library keeps the message, and the status after it, until the client reads
        on or its connection ends.
        """
        if not self._has_begun:
            # No window holds this up. Where it went with the first message, no status could follow that one.
            self._has_begun = True
            await self._context.send_initial_metadata(())
        await self._context.write(message)

    async def write_in_time(self, message: bytes) -> None:
        """Do the same; raise StatusError where the client does not read the message in time."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await self.write(message)
        except TimeoutError:
            raise overloaded() from None
