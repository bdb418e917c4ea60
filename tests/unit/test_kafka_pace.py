"""Pace: the wait between batches follows the load."""

import random

import pytest

from services.common.kafka.pace import Pace, awaited_records, gathered_records


def fetches(
    pace: Pace, rate: float, seconds: float, start: float = 100.0
) -> tuple[list[float], list[int], float]:
    """Feed records at `rate` a second, fetch at the pace. Return waits, batch sizes and the end."""
    rng = random.Random(3)
    waits, sizes = [], []
    now, arrivals = start, [start + rng.random() * 0.001]
    while arrivals[-1] < start + seconds:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    index = 0
    while index < len(arrivals):
        wait = pace.wait(now)
        waits.append(wait)
        now = max(now + wait, arrivals[index])
        count = sum(1 for at in arrivals[index : index + 500] if at <= now)
        index += count
        sizes.append(count)
        now += 0.0003
        pace.note_batch(count, now)
    return waits, sizes, now


def test_there_is_no_wait_at_a_low_rate() -> None:
    waits, _, _ = fetches(Pace(0.02), rate=200, seconds=5)
    assert max(waits[len(waits) // 2 :]) == 0


def test_a_higher_rate_makes_larger_batches() -> None:
    means = []
    for rate in (100, 500, 1000, 2000, 8000):
        _, sizes, _ = fetches(Pace(0.02), rate, seconds=4)
        late = sizes[len(sizes) // 2 :]
        means.append(sum(late) / len(late))
    assert means == sorted(means)
    assert means[0] < 1.5
    assert means[-1] > 100


def test_no_wait_is_longer_than_the_longest() -> None:
    waits, _, _ = fetches(Pace(longest=0.02), rate=50_000, seconds=1)
    assert max(waits) == pytest.approx(0.02)


def test_the_wait_ends_when_the_rate_falls() -> None:
    pace = Pace(0.02)
    _, _, end = fetches(pace, rate=5000, seconds=2)
    assert pace.wait(end) > 0.01
    waits, _, _ = fetches(pace, rate=100, seconds=6, start=end)
    assert max(waits[len(waits) // 2 :]) == 0


def test_there_is_no_wait_after_a_full_batch() -> None:
    pace = Pace(0.02)
    for turn in range(100):
        pace.note_batch(500, turn * 0.01, full=True)
    assert pace.wait(0.99) == 0


def test_records_for_which_no_task_waits_are_gathered_at_a_low_rate() -> None:
    _, single, _ = fetches(awaited_records(), rate=200, seconds=5)
    waits, gathered, _ = fetches(gathered_records(), rate=200, seconds=5)
    assert len(gathered) < len(single) / 5
    assert max(waits) <= 0.05
    # The first record after a pause goes at once.
    waits, _, _ = fetches(gathered_records(), rate=2, seconds=20)
    assert max(waits) == 0
