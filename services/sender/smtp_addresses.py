"""The relay's addresses: in which order to try them (RFC 8305), and which are remembered as dead."""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

__all__ = ["Addresses", "ConnectError", "RelayAddress", "interleave_families"]

# RFC 8305 section 8 recommends 250 ms.
_DELAY = 0.25
# A dead address comes last for this long (seconds).
_DEAD_FOR = 600.0


class RelayAddress(NamedTuple):
    """An address to connect to, as `getaddrinfo` returns it."""

    family: int
    sockaddr: tuple[Any, ...]

    @property
    def ip(self) -> str:
        return str(self.sockaddr[0])


class ConnectError(OSError):
    """The client could connect to none of the addresses."""


class Addresses:
    """Connects to a relay, and remembers its dead addresses. Belongs to one event loop.

    An address counts as dead for a while after a connection to it failed, or was still pending when a later
    one succeeded. Dead addresses are tried last.
    """

    def __init__(self, *, delay: float = _DELAY, dead_for: float = _DEAD_FOR) -> None:
        self._delay = delay
        self._dead_for = dead_for
        self._dead: dict[RelayAddress, float] = {}

    async def resolve(self, host: str, port: int) -> list[RelayAddress]:
        """Return the relay's addresses in the order in which to try them.

        Raises:
            OSError, UnicodeError: the name cannot be resolved.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return self.order([RelayAddress(family, sockaddr) for family, _, _, _, sockaddr in found])

    def order(self, addresses: Sequence[RelayAddress]) -> list[RelayAddress]:
        """Return the addresses in the order in which to try them: families alternate, dead addresses come
        last."""
        now = asyncio.get_running_loop().time()
        self._dead = {address: until for address, until in self._dead.items() if until > now}
        return sorted(interleave_families(addresses), key=lambda address: address in self._dead)

    async def connect(
        self, addresses: Sequence[RelayAddress], timeout: float
    ) -> tuple[RelayAddress, socket.socket]:
        """Connect to the first address that answers; try the next one after 250 ms or after a failure.

        Args:
            addresses: in the order in which to try them.
            timeout: seconds for each.

        Returns:
            The address and its connected, non-blocking socket.

        Raises:
            ConnectError: no address answered; the text has each one's cause.
            asyncio.CancelledError: nothing is left open.
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
        """Remember these addresses as dead."""
        until = asyncio.get_running_loop().time() + self._dead_for
        self._dead.update(dict.fromkeys(addresses, until))


def interleave_families(addresses: Sequence[RelayAddress]) -> list[RelayAddress]:
    """Return the addresses with alternating families, beginning with the first one's (RFC 8305 section 4)."""
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
