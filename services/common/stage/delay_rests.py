"""Lets partitions of delay topics rest while no record is known on them: the consumer does not fetch them.

A fetch names every partition that is not paused, and the broker looks into each. At a low rate nearly every
record takes a fetch of its own. Delay topics have most partitions of a stage, and most of those are empty.
What comes there is not due before its delay is over. So the stage looks at them now and then. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from services.common.stage.in_flight_record import Assignment

__all__ = ["DelayRests"]

# All are seconds. A look must be longer than a fetch takes, since the consumer discards a response that comes
# after the pause. The client gives up a fetch sooner than a long look ends (socket.timeout.ms).
_LOOK = 1.0
_LONG_LOOK = 12.0
# Where fetches are slow, a short look finds nothing. So each look of this number is a long one.
_LONG_LOOK_EVERY = 8
# A record must be found before it is due, so a rest is a quarter of the delay; this is the longest.
_LONGEST_REST = 15.0
# Between two passes over all partitions.
_INTERVAL = 0.25


class DelayRests:
    """Says which partitions rest. `delays` are the seconds of each delay topic, by its full name.

    A partition is looked at for 12 s when it was assigned, brought a record, or stopped being held. Then it
    rests, and is looked at for a second in turn. The poller's thread alone uses it.
    """

    def __init__(self, delays: Mapping[str, int]) -> None:
        self._delays = delays
        self._next = 0.0

    def turn(self, owned: Callable[[], Iterable[Assignment]], now: float) -> list[Assignment]:
        """Begin and end rests by `now` (monotonic seconds); return the assignments to pause or to resume.

        `owned` returns the live assignments. It is called a few times a second.
        """
        if now < self._next:
            return []
        self._next = now + _INTERVAL
        changed = []
        for assignment in owned():
            delay = self._delays.get(assignment.topic)
            if delay is None:
                continue
            if assignment.held_until is not None or assignment.turn_at is None:
                assignment.turn_at = now + _LONG_LOOK
                if assignment.resting:
                    assignment.resting = False
                    changed.append(assignment)
            elif now >= assignment.turn_at:
                assignment.resting = not assignment.resting
                if assignment.resting:
                    assignment.turn_at = now + min(_LONGEST_REST, delay / 4)
                else:
                    assignment.looks += 1
                    assignment.turn_at = now + (_LOOK if assignment.looks % _LONG_LOOK_EVERY else _LONG_LOOK)
                changed.append(assignment)
        return changed

    def wake(self, owned: Iterable[Assignment]) -> None:
        """Look at all of these as at new ones. The caller resumes them."""
        for assignment in owned:
            assignment.resting, assignment.turn_at = False, None
