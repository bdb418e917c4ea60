"""Delays: which topic, when due, when to look again."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.stage.delays import credible, look_again, schedule

DELAYS = st.lists(st.integers(1, 20_000), min_size=1, max_size=6, unique=True).map(sorted)
NOW = st.integers(0, 4_000_000_000_000)


@given(DELAYS, st.floats(0, 30_000), NOW, st.integers())
def test_never_early_and_at_most_a_tenth_late(
    delays: list[int], after: float, now_ms: int, seed: int
) -> None:
    delay, due = schedule(delays, after, now_ms, random.Random(seed))
    assert delay in delays
    assert now_ms + delay * 1000 <= due <= now_ms + delay * 1100
    if after <= delays[-1]:
        assert due >= now_ms + after * 1000
        assert all(shorter < after for shorter in delays if shorter < delay)
    else:
        assert delay == delays[-1]


def test_the_jitter_spreads() -> None:
    rng = random.Random(1)
    dues = {schedule([60], 1, 0, rng)[1] for _ in range(100)}
    assert len(dues) > 90
    assert max(dues) - min(dues) > 4000


def test_no_delays_is_an_error() -> None:
    with pytest.raises(ValueError, match="no delays"):
        schedule([], 1, 0, random.Random())


@given(DELAYS, NOW, st.integers())
def test_what_is_scheduled_is_credible_at_once_and_read_again_after_it_is_due(
    delays: list[int], now_ms: int, seed: int
) -> None:
    delay, due = schedule(delays, delays[0], now_ms, random.Random(seed))
    assert credible(due, delay, now_ms)
    assert due < look_again(due, delay) <= due + 1000


def test_a_due_time_no_schedule_makes_is_not_credible() -> None:
    assert not credible(10_000_000, 60, 0)
