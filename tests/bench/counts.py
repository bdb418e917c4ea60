"""What must be true after a load: every task is there once, ended, and its one mail was taken.

A figure of a run that lost a task means nothing, so a wrong count ends the bench with an error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.servers import Installation

__all__ = [
    "EVENTS_A_TASK",
    "WrongCountsError",
    "check",
    "counted",
    "expected",
    "wait_until_ended",
    "wait_until_settled",
]

EVENTS_A_TASK = 3
"""The timeline of a task that was sent at once: created, mx_ok, sent."""

_COUNTS = {
    "tasks": "SELECT COUNT(*) FROM tasks",
    "completed": "SELECT COUNT(*) FROM tasks WHERE status = 'completed'",
    "bodies": "SELECT COUNT(*) FROM task_bodies",
    "sent": "SELECT COUNT(*) FROM deliveries WHERE state = 'sent'",
    "events": "SELECT COUNT(*) FROM task_events",
    "outbox": "SELECT COUNT(*) FROM outbox",
}
# It reads one entry of an index, however many tasks there are.
_OPEN = "SELECT COUNT(*) FROM (SELECT 1 FROM tasks WHERE tenant = 'default' AND status IN ('pending', 'processing') LIMIT 1) AS some"  # noqa: E501
_POLL_SECONDS = 0.01


class WrongCountsError(Exception):
    """A task was lost, or a mail was sent twice. The text has each wrong count."""


def expected(created: int) -> dict[str, int]:
    """Return the counts after `created` tasks whose mails were all taken at the first attempt."""
    return {
        "tasks": created,
        "completed": created,
        "bodies": created,
        "sent": created,
        "events": created * EVENTS_A_TASK,
        "outbox": 0,
        "mails": created,
    }


def check(found: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    """Raise WrongCountsError unless both are equal."""
    if wrong := [f"{name} {found.get(name)}, not {n}" for name, n in wanted.items() if found.get(name) != n]:
        raise WrongCountsError("; ".join(wrong))


def counted(installation: Installation) -> dict[str, int]:
    """Return the counts as they are now."""
    counts = {name: installation.number(statement) for name, statement in _COUNTS.items()}
    return {**counts, "mails": installation.mails()}


def wait_until_ended(installation: Installation, seconds: float = 240.0) -> float:
    """Block until every task created so far is folded as ended; return that moment (Unix seconds).

    Raises WrongCountsError, with all counts, when it takes longer.
    """
    deadline = time.monotonic() + seconds
    # The receiver's count costs nothing, so the database is asked only near the end.
    while installation.mails() < installation.created and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    while time.monotonic() < deadline:
        if not installation.number(_OPEN):
            return time.time()
        time.sleep(_POLL_SECONDS)
    raise WrongCountsError(f"not ended after {seconds:.0f} s: {counted(installation)}")


def wait_until_settled(installation: Installation, seconds: float = 30.0) -> dict[str, int]:
    """Block until every count is as expected; return the counts. Raises WrongCountsError after `seconds`."""
    deadline, wanted = time.monotonic() + seconds, expected(installation.created)
    while True:
        found = counted(installation)
        if found == wanted or time.monotonic() > deadline:
            check(found, wanted)
            return found
        time.sleep(0.1)
