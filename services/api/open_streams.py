"""The streams that clients have open. A stream ends when its grant does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.api.errors import unauthenticated
from services.common.grants import Grant

__all__ = ["OpenStreams"]


class OpenStreams:
    """Ends streams. `is_current` returns whether a grant still holds. Belongs to one event loop."""

    def __init__(self, is_current: Callable[[Grant], bool]) -> None:
        self._is_current = is_current
        self._grants: dict[asyncio.Timeout, Grant] = {}

    @asynccontextmanager
    async def hold(self, grant: Grant) -> AsyncIterator[None]:
        """Run the `async with` block, which is a stream; raise StatusError where its grant ends first."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._grants[scope] = grant
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise unauthenticated("TOKEN_ENDED", "the token was revoked, or its time is over") from None
        finally:
            self._grants.pop(scope, None)

    def end_revoked(self) -> None:
        """End the streams whose grants no longer hold."""
        now = asyncio.get_running_loop().time()
        for scope, grant in list(self._grants.items()):
            if not self._is_current(grant):
                # A stream that ends by itself at this moment can no longer be ended.
                with contextlib.suppress(RuntimeError):
                    scope.reschedule(now)
