"""The real Poller, which the simulation wakes when there is something to do, so that it need not poll."""

from __future__ import annotations

from typing import Any

from services.common.stage import poller
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.membership import Membership
from tests.simulation.consumer import Consumer
from tests.simulation.scheduler import here
from tests.simulation.threads import VirtualTime

__all__ = ["Poller"]


class Poller(poller.Poller):
    """Lets its consumer know when it has something to do."""

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
            # The released records matter at the next commit only.
            self._consumer.nudge(self._committer._next - VirtualTime.monotonic())

    def stop(self) -> None:
        super().stop()
        if self._consumer is not None:
            self._consumer.nudge()

    def _silence(self) -> float:
        # An idle consumer checks every few seconds whether the coordinator answers. The simulation skips
        # these checks while the broker is up.
        if self._consumer is None or self._consumer.reachable:
            self._membership._heard_at = VirtualTime.monotonic()
        return Membership.silence(self._membership)

    def _behind(self) -> bool:
        """Return whether there is more to commit than what is being committed."""
        return bool(self._released) or self._committer._under_way != self._tracker.offsets_to_commit()

    def _due(self) -> float:
        """Return when the next commit is due in virtual seconds; infinity without one."""
        if self._released:
            return here().now + max(0.0, self._committer._next - VirtualTime.monotonic()) + 0.001
        if self._committer._under_way is not None or not self._tracker.offsets_to_commit():
            return float("inf")
        return here().now + max(0.0, self._committer._next - VirtualTime.monotonic()) + 0.001
