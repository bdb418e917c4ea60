"""Chooses ports below the range from which the kernel takes the ports of outgoing connections.

A killed server needs its port again when it restarts. The kernel may give a port of the ephemeral range to a
client meanwhile. The cache notes the ports that were chosen lately. A server needs seconds until it listens,
and another stack of this user must not choose its port in that time.

Standard library only: `make setup` uses it on a bare python3.
"""

import contextlib
import json
import random
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from deploy.local.cache import cache_root, locked
from deploy.local.files import write_whole

__all__ = ["HOST", "claim", "free_port", "is_free", "release"]

HOST = "127.0.0.1"
LOWEST = 15_000
# No server needs longer from the choice of its port until it listens.
NOTED_SECONDS = 300


def is_free(port: int) -> bool:
    """Return whether TCP and UDP can be bound to `port` on loopback, whatever is in TIME_WAIT."""
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
    """Return a port where nobody listens, that is not in `taken`, and that no other stack chose lately.

    Blocks while another process of this user chooses. Raises RuntimeError when there is none.
    """
    highest = _ephemeral_start()
    if highest <= LOWEST + 1000:
        highest = 61_000
    with _notes() as noted:
        for _ in range(1000):
            port = random.randrange(LOWEST, highest)
            if port not in taken and str(port) not in noted and is_free(port):
                noted[str(port)] = time.time()
                return port
    raise RuntimeError(f"no free port on {HOST} between {LOWEST} and {highest}")


def claim(port: int) -> bool:
    """Choose this port. Return False when somebody listens there or another stack chose it lately.

    Blocks while another process of this user chooses.
    """
    with _notes() as noted:
        if str(port) in noted or not is_free(port):
            return False
        noted[str(port)] = time.time()
        return True


def release(ports: Collection[int]) -> None:
    """Let others choose these ports: the servers that listened there have ended."""
    with _notes() as noted:
        for port in ports:
            noted.pop(str(port), None)


@contextlib.contextmanager
def _notes() -> Iterator[dict[str, float]]:
    """Yield the ports that were chosen lately, with their times. Store what the block changes in them."""
    notes = cache_root() / "ports.json"
    with locked("ports"):
        noted: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads(notes.read_text())
        now = time.time()
        noted = {port: at for port, at in noted.items() if now - NOTED_SECONDS < at <= now}
        yield noted
        write_whole(notes, json.dumps(noted))
