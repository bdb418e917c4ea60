"""What the stack needs to know of one process: how to start it, when it is ready, how long it may take."""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Component", "http_ok", "nothing"]


def nothing() -> None:
    """For a component that has nothing to prepare."""


@dataclass(frozen=True, slots=True)
class Component:
    """One process. `prepare` runs before each start and clears what a kill left.

    `is_ready` may take a second; `grace` is how many seconds SIGTERM is given, `patience` how many the start
    may take.
    """

    name: str
    argv: tuple[str, ...]
    address: str
    is_ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = nothing
    grace: float = 30
    patience: float = 60


def http_ok(address: str, path: str) -> bool:
    """Whether `http://address/path` answers 200 within a second."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
