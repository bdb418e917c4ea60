"""The ledger: assignments, what is in flight, what may be committed."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.stage.inflight import InFlight
from services.common.stage.ledger import Assignment, Fetched, Ledger

PARTITION = ("task.created", 0)


def fetched(assignment: Assignment, offset: int, value: bytes = b"x" * 100) -> Fetched:
    return Fetched(
        assignment=assignment, offset=offset, topic="task.created", key=b"k", value=value, headers=None
    )


def owned(ledger: Ledger) -> Assignment:
    assignment = ledger.find(*PARTITION)
    assert assignment is not None
    return assignment


def test_i3_a_completion_of_a_former_assignment_changes_nothing() -> None:
    ledger = Ledger(InFlight(10, 1 << 20))
    ledger.assign([PARTITION])
    former = owned(ledger)
    late = fetched(former, 7)
    ledger.take(late)
    ledger.let_go([former])

    ledger.assign([PARTITION])
    again = fetched(owned(ledger), 7)
    ledger.take(again)
    late.finished = True
    ledger.give_back([late])
    assert ledger.to_commit() == {owned(ledger): 7}
    assert ledger.in_flight.records == 1

    again.finished = True
    ledger.give_back([again])
    assert ledger.to_commit() == {owned(ledger): 8}


def test_i2_a_record_given_up_stays_uncommitted() -> None:
    ledger = Ledger(InFlight(10, 1 << 20))
    ledger.assign([PARTITION])
    records = [fetched(owned(ledger), offset) for offset in range(3)]
    for record in records:
        ledger.take(record)
        record.finished = record.offset != 1
    ledger.give_back(records)
    assert ledger.to_commit() == {owned(ledger): 1}
    assert ledger.in_flight.records == 0


def test_i7_nothing_is_to_be_committed_for_what_is_not_owned() -> None:
    ledger = Ledger(InFlight(10, 1 << 20))
    ledger.assign([PARTITION])
    assignment = owned(ledger)
    record = fetched(assignment, 0)
    ledger.take(record)
    record.finished = True
    ledger.give_back([record])
    assert ledger.to_commit([assignment]) == {assignment: 1}
    ledger.let_go([assignment])
    assert ledger.to_commit() == {}
    assert ledger.to_commit([assignment]) == {}
    assert ledger.find(*PARTITION) is None


def test_what_was_committed_is_not_committed_again() -> None:
    ledger = Ledger(InFlight(10, 1 << 20))
    ledger.assign([PARTITION])
    record = fetched(owned(ledger), 4)
    ledger.take(record)
    record.finished = True
    ledger.give_back([record])
    positions = ledger.to_commit()
    assert positions == ledger.to_commit()  # until it was acked
    ledger.committed(positions)
    assert ledger.to_commit() == {}


class AnyOrder(RuleBasedStateMachine):
    """Partitions come and go while records are fetched, finished late, early or never."""

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger(InFlight(50, 1 << 20))
        self.out: list[Fetched] = []
        self.next = dict.fromkeys(range(3), 0)  # what the group has committed, by partition
        self.read = dict.fromkeys(range(3), 0)
        self.done: dict[int, set[int]] = {n: set() for n in range(3)}

    @rule(number=st.integers(0, 2))
    def assign(self, number: int) -> None:
        if self.ledger.find("t", number) is None:
            self.ledger.assign([("t", number)])
            self.read[number] = self.next[number]

    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.ledger.let_go(self.ledger.select([("t", number)]))

    @rule(number=st.integers(0, 2), count=st.integers(1, 5))
    def fetch(self, number: int, count: int) -> None:
        assignment = self.ledger.find("t", number)
        if assignment is None:
            return
        for _ in range(count):
            record = fetched(assignment, self.read[number])
            self.read[number] += 1
            self.ledger.take(record)
            self.out.append(record)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), finished=st.booleans())
    def give_back(self, data: st.DataObject, finished: bool) -> None:
        record = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        record.finished = finished
        if finished:
            self.done[record.assignment.partition].add(record.offset)
        self.ledger.give_back([record])

    @rule()
    def commit(self) -> None:
        positions = self.ledger.to_commit()
        for assignment, position in positions.items():
            assert assignment.live
            assert position >= self.next[assignment.partition]
            self.next[assignment.partition] = position
        self.ledger.committed(positions)

    @invariant()
    def i1_everything_committed_is_done(self) -> None:
        for number, position in self.next.items():
            assert set(range(position)) <= self.done[number]

    @invariant()
    def i4_everything_out_is_counted(self) -> None:
        assert self.ledger.in_flight.records == len(self.out)
        assert self.ledger.in_flight.bytes == sum(record.size for record in self.out)


test_i1_i4_in_any_order = AnyOrder.TestCase


@given(st.lists(st.integers(1, 500), max_size=100))
def test_i4_full_at_the_bound_and_not_before_half_again(sizes: list[int]) -> None:
    held = InFlight(20, 5000)
    inside: list[int] = []
    rested = False
    for size in sizes:
        if held.full():
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


def test_room_is_what_is_left_and_never_none() -> None:
    held = InFlight(10, 1 << 20)
    assert held.room(500) == 10
    assert held.room(3) == 3
    for _ in range(12):
        held.add(1)
    assert held.room(500) == 1
