"""Partitions of delay topics that rest, on a real broker: their records are found."""

from __future__ import annotations

import time

import pytest

from services.common.kafka.topics import MX_OK
from services.common.stage import delay_rests
from services.common.stage.in_flight_record import Assignment
from services.common.stage.runtime import StageRuntime
from services.common.stage.types import Outcome, Record, Retry
from tests.integration.stage_kit import Kit, created, passed_on, until

_SHORT = {"_LOOK": 0.4, "_LONG_LOOK": 1.0, "_INTERVAL": 0.05}


def resting(runtime: StageRuntime) -> set[Assignment]:
    """Return the partitions that rest, and are paused in the consumer."""
    assert runtime._poller is not None
    return {a for a in runtime._poller._tracker.owned() if a.resting and a.paused}


async def test_records_on_resting_partitions_are_found(newest: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in _SHORT.items():
        monkeypatch.setattr(delay_rests, name, seconds)
    attempts: list[tuple[int, float]] = []

    def handle(record: Record) -> Outcome:
        attempts.append((record.attempt, time.time()))
        if record.attempt == 1:
            return Retry(2, int(time.time() * 1000) + 2000, "later")
        return passed_on(record)

    async with newest.running(handle=handle) as runtime:
        # Both delay topics of four partitions each; the event topic never rests.
        await until(lambda: len(resting(runtime)) == 8)
        for turn in range(3):
            await newest.publish([created()])
            await until(lambda turn=turn: newest.count(MX_OK) == turn + 1)  # type: ignore[misc]
            (_, deferred), (_, handled) = attempts[-2:]
            assert 1.9 < handled - deferred < 6
        # Each rests again, but no longer all at once.
        rested = set[Assignment]()
        await until(lambda: rested.update(resting(runtime)) or len(rested) == 8)
    assert [attempt for attempt, _ in attempts] == [1, 2] * 3
