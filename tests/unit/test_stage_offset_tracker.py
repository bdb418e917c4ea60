"""OffsetTracker: what may be committed of one assignment."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.stage.offset_tracker import OffsetTracker

# Rising offsets with gaps, now and then one that was handed out before.
STEPS = st.lists(st.tuples(st.sampled_from(["see", "again", "finish"]), st.integers(0, 50)), max_size=200)


@given(STEPS)
def test_i1_position_stays_at_or_below_the_lowest_unfinished_and_never_goes_back(
    steps: list[tuple[str, int]],
) -> None:
    offsets = OffsetTracker()
    unfinished: dict[object, int] = {}
    seen: list[int] = []
    before = None
    for step, number in steps:
        if step == "see":
            offset = (seen[-1] if seen else 0) + 1 + number % 7
            seen.append(offset)
            mark = object()
            unfinished[mark] = offset
            offsets.add(mark, offset)
        elif step == "finish" and unfinished:
            mark = list(unfinished)[number % len(unfinished)]
            del unfinished[mark]
            assert offsets.finish(mark)
            assert not offsets.finish(mark)
        position = offsets.to_commit()
        assert position is None or not unfinished or position <= min(unfinished.values())
        assert before is None or (position is not None and position >= before)
        if seen and not unfinished:
            assert position == max(seen) + 1
        before = position


def test_i1_an_offset_handed_out_again_holds_the_position_but_does_not_pull_it_back() -> None:
    offsets = OffsetTracker()
    first, second, again = object(), object(), object()
    offsets.add(first, 5)
    offsets.add(second, 9)
    offsets.finish(first)
    assert offsets.to_commit() == 9
    offsets.add(again, 5)
    offsets.finish(second)
    assert offsets.to_commit() == 9
    offsets.finish(again)
    assert offsets.to_commit() == 10


def test_gaps_are_not_waited_for() -> None:
    offsets = OffsetTracker()
    marks = {offset: object() for offset in (3, 17, 400)}
    assert offsets.to_commit() is None
    for offset, mark in marks.items():
        offsets.add(mark, offset)
    assert offsets.to_commit() == 3
    offsets.finish(marks[3])
    assert offsets.to_commit() == 17
    offsets.finish(marks[400])
    assert offsets.to_commit() == 17
    offsets.finish(marks[17])
    assert offsets.to_commit() == 401


def test_i4_what_is_finished_behind_a_stuck_record_takes_no_memory() -> None:
    offsets = OffsetTracker()
    offsets.add(object(), 0)
    for offset in range(1, 10_000):
        mark = object()
        offsets.add(mark, offset)
        offsets.finish(mark)
    assert len(offsets) == 1
    assert offsets.to_commit() == 0
