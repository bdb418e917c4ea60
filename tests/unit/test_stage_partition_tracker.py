"""PartitionTracker: assignments, records in flight, offsets to commit; and InFlightLimit."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.partition_tracker import PartitionTracker

PARTITION = TopicPartition("task.created", 0)


def fetched_record(assignment: Assignment, offset: int, value: bytes = b"x" * 100) -> InFlightRecord:
    return InFlightRecord(
        assignment=assignment, offset=offset, topic="task.created", key=b"k", value=value, headers=None
    )


def owned(tracker: PartitionTracker) -> Assignment:
    assignment = tracker.find(*PARTITION)
    assert assignment is not None
    return assignment


def test_i3_a_record_of_an_earlier_assignment_moves_no_offset() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    earlier = owned(tracker)
    late = fetched_record(earlier, 7)
    tracker.add(late)
    tracker.release_partitions([earlier])

    tracker.assign([PARTITION])
    again = fetched_record(owned(tracker), 7)
    tracker.add(again)
    late.finished = True
    tracker.release([late])
    assert tracker.offsets_to_commit() == {owned(tracker): 7}
    assert tracker.in_flight.records == 1

    again.finished = True
    tracker.release([again])
    assert tracker.offsets_to_commit() == {owned(tracker): 8}


def test_i2_an_abandoned_record_stays_uncommitted() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    records = [fetched_record(owned(tracker), offset) for offset in range(3)]
    for record in records:
        tracker.add(record)
        record.finished = record.offset != 1
    tracker.release(records)
    assert tracker.offsets_to_commit() == {owned(tracker): 1}
    assert tracker.in_flight.records == 0


def test_i7_partitions_that_are_not_owned_have_no_offset_to_commit() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    assignment = owned(tracker)
    record = fetched_record(assignment, 0)
    tracker.add(record)
    record.finished = True
    tracker.release([record])
    assert tracker.offsets_to_commit([assignment]) == {assignment: 1}
    tracker.release_partitions([assignment])
    assert tracker.offsets_to_commit() == {}
    assert tracker.offsets_to_commit([assignment]) == {}
    assert tracker.find(*PARTITION) is None


def test_a_committed_offset_is_not_committed_again() -> None:
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    tracker.assign([PARTITION])
    record = fetched_record(owned(tracker), 4)
    tracker.add(record)
    record.finished = True
    tracker.release([record])
    offsets = tracker.offsets_to_commit()
    assert offsets == tracker.offsets_to_commit()  # until it was acked
    tracker.mark_committed(offsets)
    assert tracker.offsets_to_commit() == {}


class AnyOrder(RuleBasedStateMachine):
    """Assigns and takes away partitions while it fetches records and finishes them late, early or never."""

    @initialize()
    def begin(self) -> None:
        self.tracker = PartitionTracker(InFlightLimit(50, 1 << 20))
        self.in_flight: list[InFlightRecord] = []
        self.next = dict.fromkeys(range(3), 0)  # the offset that the group committed, by partition
        self.read = dict.fromkeys(range(3), 0)
        self.done: dict[int, set[int]] = {n: set() for n in range(3)}

    @rule(number=st.integers(0, 2))
    def assign(self, number: int) -> None:
        if self.tracker.find("t", number) is None:
            self.tracker.assign([TopicPartition("t", number)])
            self.read[number] = self.next[number]

    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.tracker.release_partitions(self.tracker.select([TopicPartition("t", number)]))

    @rule(number=st.integers(0, 2), count=st.integers(1, 5))
    def fetch(self, number: int, count: int) -> None:
        assignment = self.tracker.find("t", number)
        if assignment is None:
            return
        for _ in range(count):
            record = fetched_record(assignment, self.read[number])
            self.read[number] += 1
            self.tracker.add(record)
            self.in_flight.append(record)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), finished=st.booleans())
    def release(self, data: st.DataObject, finished: bool) -> None:
        record = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        record.finished = finished
        if finished:
            self.done[record.assignment.partition].add(record.offset)
        self.tracker.release([record])

    @rule()
    def commit(self) -> None:
        offsets = self.tracker.offsets_to_commit()
        for assignment, offset in offsets.items():
            assert assignment.live
            assert offset >= self.next[assignment.partition]
            self.next[assignment.partition] = offset
        self.tracker.mark_committed(offsets)

    @invariant()
    def i1_every_committed_record_is_finished(self) -> None:
        for number, offset in self.next.items():
            assert set(range(offset)) <= self.done[number]

    @invariant()
    def i4_every_record_in_flight_is_counted(self) -> None:
        assert self.tracker.in_flight.records == len(self.in_flight)
        assert self.tracker.in_flight.bytes == sum(record.size for record in self.in_flight)


test_i1_i4_in_any_order = AnyOrder.TestCase


@given(st.lists(st.integers(1, 500), max_size=100))
def test_i4_the_limit_is_reached_at_the_bound_and_until_half_of_it(sizes: list[int]) -> None:
    limit = InFlightLimit(20, 5000)
    inside: list[int] = []
    paused = False
    for size in sizes:
        if limit.reached():
            paused = True
            assert len(inside) * 2 > 20 or sum(inside) * 2 > 5000
            limit.remove(inside.pop())
        else:
            if paused:
                assert len(inside) * 2 <= 20
                assert sum(inside) * 2 <= 5000
            paused = False
            assert len(inside) < 20
            assert sum(inside) < 5000
            limit.add(size)
            inside.append(size)


def test_the_capacity_is_what_is_left_and_at_least_one() -> None:
    limit = InFlightLimit(10, 1 << 20)
    assert limit.capacity(500) == 10
    assert limit.capacity(3) == 3
    for _ in range(12):
        limit.add(1)
    assert limit.capacity(500) == 1
