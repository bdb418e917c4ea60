"""OffsetTracker: which offset of one assignment may be committed."""

from hypothesis import given
from hypothesis import strategies as st

from services.common.stage.offset_tracker import OffsetTracker

# Rising offsets with gaps, now and then one that was fetched before.
STEPS = st.lists(st.tuples(st.sampled_from(["see", "again", "finish"]), st.integers(0, 50)), max_size=200)


@given(STEPS)
def test_i1_the_offset_stays_at_or_below_the_lowest_unfinished_and_never_goes_back(
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
            record = object()
            unfinished[record] = offset
            offsets.add(record, offset)
        elif step == "finish" and unfinished:
            record = list(unfinished)[number % len(unfinished)]
            del unfinished[record]
            assert offsets.finish(record)
            assert not offsets.finish(record)
        to_commit = offsets.to_commit()
        assert to_commit is None or not unfinished or to_commit <= min(unfinished.values())
        assert before is None or (to_commit is not None and to_commit >= before)
        if seen and not unfinished:
            assert to_commit == max(seen) + 1
        before = to_commit


def test_i1_a_record_fetched_again_holds_the_offset_but_does_not_take_it_back() -> None:
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
    records = {offset: object() for offset in (3, 17, 400)}
    assert offsets.to_commit() is None
    for offset, record in records.items():
        offsets.add(record, offset)
    assert offsets.to_commit() == 3
    offsets.finish(records[3])
    assert offsets.to_commit() == 17
    offsets.finish(records[400])
    assert offsets.to_commit() == 17
    offsets.finish(records[17])
    assert offsets.to_commit() == 401


def test_i4_records_finished_behind_an_unfinished_one_take_no_memory() -> None:
    offsets = OffsetTracker()
    offsets.add(object(), 0)
    for offset in range(1, 10_000):
        record = object()
        offsets.add(record, offset)
        offsets.finish(record)
    assert len(offsets) == 1
    assert offsets.to_commit() == 0
