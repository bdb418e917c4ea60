"""Free ports that stay free: chosen below the range that the kernel hands to outgoing connections.

A server that is killed and started again needs its port back; out of the ephemeral range any client might
have been given it meanwhile.
"""

import random
import socket
from collections.abc import Collection
from pathlib import Path

__all__ = ["free_port", "is_free"]

LOWEST = 15_000
HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether TCP and UDP can be bound to `port` on loopback, connections in TIME_WAIT aside."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                return False
    return True


def _ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32_768


def free_port(taken: Collection[int]) -> int:
    """A port that nobody listens on and that is not in `taken`. Raises RuntimeError when none is found."""
    highest = _ephemeral_start()
    if highest <= LOWEST + 1000:
        highest = 61_000
    for _ in range(1000):
        port = random.randrange(LOWEST, highest)
        if port not in taken and is_free(port):
            return port
    raise RuntimeError(f"no free port on {HOST} between {LOWEST} and {highest}")
