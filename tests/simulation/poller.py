"""The real Poller, woken where it would otherwise look ten times a second whether it has something to do."""

from __future__ import annotations

from typing import Any

from services.common.stage import poller
from services.common.stage.membership import Membership
from services.common.stage.partition_tracker import InFlightRecord
from tests.simulation.consumer import Consumer
from tests.simulation.scheduler import here
from tests.simulation.threads import VirtualTime

__all__ = ["Poller"]


class Poller(poller.Poller):
    """Tells its consumer when it has something to do of its own."""

    _consumer: Consumer | None = None  # type: ignore[assignment]

    def __init__(self, config: Any, *arguments: Any, consumer: Any, **named: Any) -> None:
        def make(final: Any) -> Any:
            made: Consumer = consumer(final)
            made.due, made.behind = self._due, self._behind
            self._tracker.consumer = made  # type: ignore[attr-defined]
            return made

        super().__init__(config, *arguments, consumer=make, **named)
        self._membership.silence = self._silence  # type: ignore[method-assign]

    def release(self, records: list[InFlightRecord]) -> None:
        super().release(records)
        if self._consumer is not None:
            # Nothing comes of it before the next commit.
            self._consumer.nudge(self._committer._next - VirtualTime.monotonic())

    def stop(self) -> None:
        super().stop()
        if self._consumer is not None:
            self._consumer.nudge()

    def _silence(self) -> float:
        # Whoever idles asks every few seconds whether it is heard; that it would have been, while the
        # broker is there, is not played.
        if self._consumer is None or self._consumer.reachable:
            self._membership._heard_at = VirtualTime.monotonic()
        return Membership.silence(self._membership)

    def _behind(self) -> bool:
        """Whether there is more to commit than what is being committed."""
        return bool(self._released) or self._committer._under_way != self._tracker.offsets_to_commit()

    def _due(self) -> float:
        """When to turn next, in virtual seconds: the next commit, where one is to be made."""
        if self._released:
            return here().now + max(0.0, self._committer._next - VirtualTime.monotonic()) + 0.001
        if self._committer._under_way is not None or not self._tracker.offsets_to_commit():
            return float("inf")
        return here().now + max(0.0, self._committer._next - VirtualTime.monotonic()) + 0.001
