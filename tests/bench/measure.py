"""Measures one load on an installation: from its first Create until its last task is folded as completed.

The CPU is that of every process but this one, which makes the load. A mail's acceptance has the time of the
timeline's `sent`, which the sender takes as the reply comes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC
from typing import Any
from uuid import UUID

from tests.bench.counts import wait_until_ended, wait_until_settled
from tests.bench.load import Sent
from tests.bench.servers import Installation
from tests.bench.usage import spent

__all__ = ["Figures", "figures", "is_refusal", "median", "quantiles"]

_QUIET_SECONDS = 1.2


@dataclass(frozen=True, slots=True)
class Figures:
    """What one load cost. Times are in milliseconds, CPU in microseconds a task, by service and server.

    `rate` is in tasks a second until the last one has ended, `create_rate` until the last Create is answered.
    """

    tasks: int
    refused: int
    rate: float
    create_rate: float
    cpu_us: dict[str, float]
    create_ms: dict[str, float]
    accepted_ms: dict[str, float]
    resident_mb: dict[str, float] = field(default_factory=dict)

    @property
    def total_us(self) -> float:
        """The CPU of all processes but the load's."""
        return sum(self.cpu_us.values())

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return {**asdict(self), "total_us": self.total_us}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile of some seconds, in milliseconds."""
    if len(seconds) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), round(sum(seconds) * 1000, 1))
    cuts = statistics.quantiles(seconds, n=1000, method="inclusive")
    return {name: round(cuts[at] * 1000, 1) for name, at in (("p50", 499), ("p95", 949), ("p99", 989))}


def median(rounds: Sequence[Figures]) -> Figures:
    """Return the median of each figure over some rounds of one load."""

    def middle(of: Callable[[Figures], dict[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for one in rounds for name in of(one))
        return {name: statistics.median(of(one).get(name, 0.0) for one in rounds) for name in names}

    return Figures(
        tasks=sum(one.tasks for one in rounds),
        refused=sum(one.refused for one in rounds),
        rate=statistics.median(one.rate for one in rounds),
        create_rate=statistics.median(one.create_rate for one in rounds),
        cpu_us=middle(lambda one: one.cpu_us),
        create_ms=middle(lambda one: one.create_ms),
        accepted_ms=middle(lambda one: one.accepted_ms),
        resident_mb=middle(lambda one: one.resident_mb),
    )


def is_refusal(error: str) -> bool:
    """Return whether a saturated api refused a call before it did anything: the caller may try again.

    REFUSED_STREAM is code 7 (RFC 9113 section 7).
    """
    return error.startswith("RESOURCE_EXHAUSTED") or "RST_STREAM with error code 7" in error


async def figures(installation: Installation, load: Callable[[], Awaitable[Sent]]) -> Figures:
    """Run a load, wait until its tasks have ended, and check every count.

    Raises WrongCountsError for a task that is lost or a mail too many, and RuntimeError for a failed call.
    """
    await asyncio.sleep(_QUIET_SECONDS)
    before, start = installation.usage(), time.time()
    sent = await load()
    answered = time.time()
    refused = [error for error in sent.errors if is_refusal(error)]
    if len(refused) < len(sent.errors):
        raise RuntimeError(f"{len(sent.errors)} calls failed: {sorted(set(sent.errors) - set(refused))[:3]}")
    installation.created += len(sent.called_at)
    end = wait_until_ended(installation)
    wait_until_settled(installation)
    after = installation.usage()
    tasks = len(sent.called_at)
    accepted = _accepted(installation, sent)
    return Figures(
        tasks=tasks,
        refused=len(refused),
        rate=round(tasks / (end - start), 1),
        create_rate=round(tasks / (answered - start), 1),
        cpu_us={
            name: round(seconds / tasks * 1e6, 1) for name, seconds in spent(before, after).items() if seconds
        },
        create_ms=quantiles(sent.seconds),
        accepted_ms=quantiles([accepted[id_] - at for id_, at in sent.called_at.items()]),
        resident_mb={name: round(used.resident_mb, 1) for name, used in after.items()},
    )


def _accepted(installation: Installation, sent: Sent) -> dict[str, float]:
    """Return when each mail of a load was accepted, in Unix seconds, by its task's id."""
    first, last = (UUID(id_).hex for id_ in (min(sent.called_at), max(sent.called_at)))
    rows = installation.query(
        "SELECT task_id, at FROM task_events"
        f" WHERE kind = 'sent' AND task_id BETWEEN X'{first}' AND X'{last}'"
    )
    return {str(UUID(bytes=bytes(id_))): at.replace(tzinfo=UTC).timestamp() for id_, at in rows}
