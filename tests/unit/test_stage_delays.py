"""Delays: which topic a record gets, when it is due, and until when its partition is held."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.stage.delays import choose_delay, longest_wait
from services.common.stage.head_holds import FirstSeen, held_until, next_look_ms

DELAYS = st.lists(st.integers(1, 20_000), min_size=1, max_size=6, unique=True).map(sorted)
NOW = st.integers(0, 4_000_000_000_000)


@given(DELAYS, st.floats(0, 30_000), NOW, st.integers())
def test_a_due_time_is_never_early_and_at_most_a_tenth_late(
    delays: list[int], after: float, now_ms: int, seed: int
) -> None:
    delay, due = choose_delay(delays, after, now_ms, random.Random(seed))
    assert delay in delays
    assert now_ms + delay * 1000 <= due <= now_ms + delay * 1100
    if after <= delays[-1]:
        assert due >= now_ms + after * 1000
        assert all(shorter < after for shorter in delays if shorter < delay)
    else:
        assert delay == delays[-1]


def test_jitter_spreads_the_due_times() -> None:
    rng = random.Random(1)
    dues = {choose_delay([60], 1, 0, rng)[1] for _ in range(100)}
    assert len(dues) > 90
    assert max(dues) - min(dues) > 4000


def test_no_delays_is_an_error() -> None:
    with pytest.raises(ValueError, match="no delays"):
        choose_delay([], 1, 0, random.Random())


@given(DELAYS, NOW, st.integers())
def test_a_partition_is_read_again_after_its_head_is_due(delays: list[int], now_ms: int, seed: int) -> None:
    delay, due = choose_delay(delays, delays[0], now_ms, random.Random(seed))
    assert due < next_look_ms(due, delay) <= due + 1000
    assert due <= now_ms + 1000 * longest_wait(delay) + 1


@pytest.mark.parametrize("skew", [-(10**9), -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 90.0, 10**9])
@pytest.mark.parametrize("delay", [5, 60, 14_400])
def test_no_record_waits_longer_than_its_delay_and_jitter_whatever_the_clocks_say(
    skew: float, delay: int
) -> None:
    """A record a second, in seconds of true time; the writer's clock is `skew` ahead of the reader's."""
    rng, seen, step = random.Random(3), FirstSeen(), delay / 60
    written = [step * n for n in range(200)]
    due = [choose_delay([delay], 0, round(1000 * (at + skew)), rng)[1] for at in written]
    now, head, looks = 0.0, 0, 0
    while head < len(written):
        now = max(now, written[head])
        looks += 1
        until = held_until(due[head], delay, round(1000 * now), now, seen.since(head, now))
        if until is None:
            waited = now - written[head]
            # Looks are a tenth of the delay apart, so a record may be seen that much later.
            assert waited <= 1.2 * delay
            if skew >= 0:
                assert waited >= delay - 0.001
            head += 1
            continue
        seen.note(head + 1, now, delay * 0.02)
        seen.note(sum(at <= now for at in written), now, delay * 0.02)
        assert until > now
        now = until
    assert looks < 40 * len(written)


def test_a_clock_that_is_set_back_makes_no_wait_longer() -> None:
    assert held_until(60_000, 60, 0, 100.0, 100.0) == pytest.approx(161)
    assert held_until(60_000, 60, -(10**9), 161.0, 100.0) == pytest.approx(166)
    assert held_until(60_000, 60, -(10**9), 166.0, 100.0) is None


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 3)), max_size=60))
def test_no_record_counts_as_older_than_it_is_known_to_be(steps: list[tuple[int, float]]) -> None:
    seen, end, now, grain = FirstSeen(), 0, 0.0, 1.0
    known: list[float] = []
    for more, after in steps:
        end, now = end + more, now + after
        known += [now] * more
        seen.note(end, now, grain)
    for offset, since in enumerate(known):
        assert since <= seen.since(offset, now) <= since + grain
    assert seen.since(end, now + 5) == now + 5
    assert len(seen._ends) <= now / grain + 1
