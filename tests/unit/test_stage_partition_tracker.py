"""The tracker: assignments, what is in flight, what may be committed."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.partition_tracker import Assignment, InFlightRecord, PartitionTracker

PARTITION = ("task.created", 0)


def fetched(assignment: Assignment, offset: int, value: bytes = b"x" * 100) -> InFlightRecord:
    return InFlightRecord(
        assignment=assignment, offset=offset, topic="task.created", key=b"k", value=value, headers=None
    )


def owned(tracker: PartitionTracker) -> Assignment:
    assignment = tracker.find(*PARTITION)
    assert assignment is not None
    return assignment


def test_i3_a_completion_of_a_former_assignment_changes_nothing() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    former = owned(tracker)
    late = fetched(former, 7)
    tracker.add(late)
    tracker.release_partitions([former])

    tracker.assign([PARTITION])
    again = fetched(owned(tracker), 7)
    tracker.add(again)
    late.finished = True
    tracker.release([late])
    assert tracker.offsets_to_commit() == {owned(tracker): 7}
    assert tracker.in_flight.records == 1

    again.finished = True
    tracker.release([again])
    assert tracker.offsets_to_commit() == {owned(tracker): 8}


def test_i2_a_record_given_up_stays_uncommitted() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    records = [fetched(owned(tracker), offset) for offset in range(3)]
    for record in records:
        tracker.add(record)
        record.finished = record.offset != 1
    tracker.release(records)
    assert tracker.offsets_to_commit() == {owned(tracker): 1}
    assert tracker.in_flight.records == 0


def test_i7_nothing_is_to_be_committed_for_what_is_not_owned() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    assignment = owned(tracker)
    record = fetched(assignment, 0)
    tracker.add(record)
    record.finished = True
    tracker.release([record])
    assert tracker.offsets_to_commit([assignment]) == {assignment: 1}
    tracker.release_partitions([assignment])
    assert tracker.offsets_to_commit() == {}
    assert tracker.offsets_to_commit([assignment]) == {}
    assert tracker.find(*PARTITION) is None


def test_what_was_committed_is_not_committed_again() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    record = fetched(owned(tracker), 4)
    tracker.add(record)
    record.finished = True
    tracker.release([record])
    positions = tracker.offsets_to_commit()
    assert positions == tracker.offsets_to_commit()  # until it was acked
    tracker.mark_committed(positions)
    assert tracker.offsets_to_commit() == {}


class AnyOrder(RuleBasedStateMachine):
    """Partitions come and go while records are fetched, finished late, early or never."""

    @initialize()
    def begin(self) -> None:
        self.tracker = PartitionTracker(InFlightLimit(50, 1 << 20))
        self.out: list[InFlightRecord] = []
        self.next = dict.fromkeys(range(3), 0)  # what the group has committed, by partition
        self.read = dict.fromkeys(range(3), 0)
        self.done: dict[int, set[int]] = {n: set() for n in range(3)}

    @rule(number=st.integers(0, 2))
    def assign(self, number: int) -> None:
        if self.tracker.find("t", number) is None:
            self.tracker.assign([("t", number)])
            self.read[number] = self.next[number]

    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.tracker.release_partitions(self.tracker.select([("t", number)]))

    @rule(number=st.integers(0, 2), count=st.integers(1, 5))
    def fetch(self, number: int, count: int) -> None:
        assignment = self.tracker.find("t", number)
        if assignment is None:
            return
        for _ in range(count):
            record = fetched(assignment, self.read[number])
            self.read[number] += 1
            self.tracker.add(record)
            self.out.append(record)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), finished=st.booleans())
    def give_back(self, data: st.DataObject, finished: bool) -> None:
        record = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        record.finished = finished
        if finished:
            self.done[record.assignment.partition].add(record.offset)
        self.tracker.release([record])

    @rule()
    def commit(self) -> None:
        positions = self.tracker.offsets_to_commit()
        for assignment, position in positions.items():
            assert assignment.live
            assert position >= self.next[assignment.partition]
            self.next[assignment.partition] = position
        self.tracker.mark_committed(positions)

    @invariant()
    def i1_everything_committed_is_done(self) -> None:
        for number, position in self.next.items():
            assert set(range(position)) <= self.done[number]

    @invariant()
    def i4_everything_out_is_counted(self) -> None:
        assert self.tracker.in_flight.records == len(self.out)
        assert self.tracker.in_flight.bytes == sum(record.size for record in self.out)


test_i1_i4_in_any_order = AnyOrder.TestCase


@given(st.lists(st.integers(1, 500), max_size=100))
def test_i4_full_at_the_bound_and_not_before_half_again(sizes: list[int]) -> None:
    held = InFlightLimit(20, 5000)
    inside: list[int] = []
    rested = False
    for size in sizes:
        if held.reached():
            rested = True
            assert len(inside) * 2 > 20 or sum(inside) * 2 > 5000
            held.remove(inside.pop())
        else:
            if rested:
                assert len(inside) * 2 <= 20
                assert sum(inside) * 2 <= 5000
            rested = False
            assert len(inside) < 20
            assert sum(inside) < 5000
            held.add(size)
            inside.append(size)


def test_the_capacity_is_what_is_left_and_at_least_one() -> None:
    held = InFlightLimit(10, 1 << 20)
    assert held.capacity(500) == 10
    assert held.capacity(3) == 3
    for _ in range(12):
        held.add(1)
    assert held.capacity(500) == 1
