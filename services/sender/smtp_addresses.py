"""The relay's addresses: in which order they are tried (RFC 8305), and which are remembered as dead."""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

__all__ = ["Addresses", "ConnectError", "RelayAddress", "interleave_families"]

# RFC 8305 section 8 recommends 250 ms.
_DELAY = 0.25
# How long (seconds) a dead address comes last.
_DEAD_FOR = 600.0


class RelayAddress(NamedTuple):
    """Where to connect to, as `getaddrinfo` has it."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def ip(self) -> str:
        return str(self.sockaddr[0])


class ConnectError(OSError):
    """No address could be connected to."""


class Addresses:
    """What is known of a relay's addresses. Belongs to one event loop.

    An address is dead for a while once a connection to it failed, or stood while a later one came about. Dead
    ones are tried after all others, so that a relay of which all are dead is still asked.
    """

    def __init__(self, *, delay: float = _DELAY, dead_for: float = _DEAD_FOR) -> None:
        self._delay = delay
        self._dead_for = dead_for
        self._dead: dict[RelayAddress, float] = {}

    async def resolve(self, host: str, port: int) -> list[RelayAddress]:
        """Return the addresses in the order in which they are to be tried.

        Raises:
            OSError, UnicodeError: the name cannot be resolved.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return self.order([RelayAddress(family, sockaddr) for family, _, _, _, sockaddr in found])

    def order(self, addresses: Sequence[RelayAddress]) -> list[RelayAddress]:
        """Return the addresses as they are to be tried: families in turn, dead ones last."""
        now = asyncio.get_running_loop().time()
        self._dead = {address: until for address, until in self._dead.items() if until > now}
        return sorted(interleave_families(addresses), key=lambda address: address in self._dead)

    async def connect(
        self, addresses: Sequence[RelayAddress], timeout: float
    ) -> tuple[RelayAddress, socket.socket]:
        """Connect to the first address that answers; the next one is tried after 250 ms, or at a failure.

        Args:
            addresses: in the order in which they are tried.
            timeout: seconds for each.

        Returns:
            The address and its connected socket, which does not block.

        Raises:
            ConnectError: none can be connected to. It has each one's cause.
            asyncio.CancelledError: and nothing is left open.
        """
        left = deque(addresses)
        running: dict[asyncio.Task[socket.socket], RelayAddress] = {}
        failed: dict[RelayAddress, str] = {}
        try:
            while left or running:
                if left:
                    address = left.popleft()
                    running[asyncio.ensure_future(_connected(address, timeout))] = address
                done, _ = await asyncio.wait(
                    running, timeout=self._delay if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in sorted(done, key=lambda task: addresses.index(running[task])):
                    error = task.exception()
                    if error is None:
                        address = running.pop(task)
                        self.mark(*failed, *(other for one, other in running.items() if not one.done()))
                        self._dead.pop(address, None)
                        return address, task.result()
                    failed[running.pop(task)] = str(error) or "connection timed out"
        finally:
            for task in running:
                task.cancel()
            for late in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(late, socket.socket):
                    late.close()
        self.mark(*failed)
        causes = [
            cause if len(failed) == 1 else f"{address.ip}: {cause}" for address, cause in failed.items()
        ]
        raise ConnectError("; ".join(causes) or "no address")

    def mark(self, *addresses: RelayAddress) -> None:
        """Remember these as dead."""
        until = asyncio.get_running_loop().time() + self._dead_for
        self._dead.update(dict.fromkeys(addresses, until))


def interleave_families(addresses: Sequence[RelayAddress]) -> list[RelayAddress]:
    """Return the addresses with their families in turn, that of the first one first (RFC 8305 section 4)."""
    families: dict[int, list[RelayAddress]] = {}
    for address in dict.fromkeys(addresses):
        families.setdefault(address.family, []).append(address)
    return [address for address in chain(*zip_longest(*families.values())) if address is not None]


async def _connected(address: RelayAddress, timeout: float) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(sock, address.sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock
