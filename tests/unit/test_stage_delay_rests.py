"""Empty partitions of delay topics rest, and each is looked at often enough."""

from __future__ import annotations

import itertools

import pytest

from services.common.stage.delay_rests import DelayRests
from services.common.stage.in_flight_record import Assignment

# So long may a fetch take before the client gives it up, in seconds.
SLOWEST_FETCH = 10.0


def awake(rests: DelayRests, assignment: Assignment, seconds: float, step: float = 0.1) -> list[bool]:
    """Return for each step whether the partition is looked at."""
    found = []
    for turn in range(round(seconds / step)):
        rests.turn(lambda: [assignment], 1000 + turn * step)
        found.append(not assignment.resting)
    return found


def runs(states: list[bool], state: bool, step: float = 0.1) -> list[float]:
    """Return the seconds of each time that the partition was looked at, or not."""
    return [len(list(run)) * step for value, run in itertools.groupby(states) if value is state]


@pytest.mark.parametrize("delay", [1, 5, 60, 14400])
def test_an_empty_partition_is_found_to_be_so_before_a_record_is_due(delay: int) -> None:
    states = awake(DelayRests({"delay": delay}), Assignment("delay", 3), 600)
    assert max(runs(states, False)) <= min(15.0, delay / 4) + 0.6
    if delay >= 60:
        assert sum(states) < 0.2 * len(states)


def test_it_is_looked_at_for_longer_than_the_slowest_fetch_now_and_then() -> None:
    states = awake(DelayRests({"delay": 60}), Assignment("delay", 3), 600)
    assert sum(look > SLOWEST_FETCH for look in runs(states, True)) >= 4


def test_a_partition_of_an_event_topic_never_rests() -> None:
    assert all(awake(DelayRests({"delay": 60}), Assignment("task.created", 3), 600))


def test_a_partition_that_brought_a_record_or_is_held_does_not_rest() -> None:
    rests, assignment = DelayRests({"delay": 60}), Assignment("delay", 3)
    awake(rests, assignment, 20)
    assert assignment.resting
    # A record that was on its way before the pause.
    assignment.turn_at = None
    assert rests.turn(lambda: [assignment], 2000) == [assignment]
    assert not assignment.resting
    assignment.held_until = 5000.0
    for now in range(2001, 3000):
        assert rests.turn(lambda: [assignment], now) == []
    assignment.held_until = None
    assert rests.turn(lambda: [assignment], 2999 + SLOWEST_FETCH) == []
    assert rests.turn(lambda: [assignment], 3020) == [assignment]


def test_a_woken_partition_is_looked_at_as_a_new_one() -> None:
    rests, assignment = DelayRests({"delay": 60}), Assignment("delay", 3)
    awake(rests, assignment, 20)
    rests.wake([assignment])
    assert not assignment.resting
    assert rests.turn(lambda: [assignment], 2000) == []
    assert rests.turn(lambda: [assignment], 2000 + SLOWEST_FETCH) == []
