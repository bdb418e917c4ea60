"""What the stack knows of one process: how to start it, when it is ready, how long it may take."""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Component", "http_ok", "nothing"]


def nothing() -> None:
    """Do nothing: the `prepare` of a component that needs no preparation."""


@dataclass(frozen=True, slots=True)
class Component:
    """How to run one process.

    `prepare` runs before each start and removes what a killed process left. `is_ready` may block for a
    second. The stack waits `start_timeout` seconds for a start, and `grace` seconds after SIGTERM before it
    sends SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    address: str
    is_ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = nothing
    grace: float = 30
    start_timeout: float = 60


def http_ok(address: str, path: str) -> bool:
    """Return whether `http://address/path` answers 200 within a second."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
