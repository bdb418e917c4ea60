"""Counts the calls of each peer that no token allows, and limits them. Pure."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from urllib.parse import unquote

__all__ = ["BURST", "MAX_PEERS", "FailedAttempts", "peer_address"]

BURST = 20
"""Failed attempts that a peer may make at once. It regains one a second."""
MAX_PEERS = 4096
"""Peers that are remembered: those that failed last. Each takes some 200 bytes."""


class FailedAttempts:
    """Knows for each peer when all its failed attempts will be forgotten (monotonic seconds)."""

    def __init__(self) -> None:
        self._forgotten_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._forgotten_at)

    def count(self, address: str, now: float) -> float:
        """Count one failed attempt; return 0, or the seconds after which the peer may make the next one."""
        before = max(self._forgotten_at.pop(address, now), now)
        wait = max(0.0, before + 1 - now - BURST)
        # At the end, because it failed last.
        self._forgotten_at[address] = before if wait else before + 1
        if len(self._forgotten_at) > MAX_PEERS:
            self._forgotten_at.popitem(last=False)
        return wait


def peer_address(peer: str) -> str:
    """Return the address in gRPC's name of a peer (`ipv4:192.0.2.1:5000`), of IPv6 its network of 64 bits."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if kind == "ipv6":
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            return host
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host or peer
