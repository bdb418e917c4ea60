"""What is known of how long a statement may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.statement_size import LONG, Statements, bytes_at_most, portions

SERVER = 16 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def statements(clock: Clock) -> Statements:
    return Statements(clock)


@pytest.mark.parametrize("server", [1024, 1 << 20, SERVER, 1 << 30])
def test_a_statement_is_shorter_than_what_the_server_takes(statements: Statements, server: int) -> None:
    assert server // 2 <= statements.most(server) < server
    assert statements.share() is None


def test_what_the_server_refuses_is_not_sent_again_until_it_may_be_otherwise(
    statements: Statements, clock: Clock
) -> None:
    statements.refused(5 << 20)
    assert statements.most(SERVER) == (5 << 20) - 1
    clock.now += 601
    assert statements.most(SERVER) > 5 << 20


def test_each_loss_halves_the_share_of_many_rows(statements: Statements, clock: Clock) -> None:
    statements.lost(12 << 20)
    assert statements.share() == 6 << 20
    statements.lost(12 << 20)  # it was under way meanwhile, or it is a single row
    assert statements.share() == 6 << 20
    statements.lost(5 << 20)
    assert statements.share() == 5 << 19
    for _ in range(5):
        statements.lost(LONG + 1)
    assert statements.share() == LONG
    clock.now += 601
    assert statements.share() is None


def test_a_statement_that_is_lost_for_long_is_refused(statements: Statements, clock: Clock) -> None:
    for _ in range(20):
        statements.lost(3 << 20)
    assert statements.most(SERVER) > 3 << 20  # all in one moment: the server may just have gone away
    clock.now += 21
    statements.lost(3 << 20)
    assert statements.most(SERVER) == (3 << 20) - 1


def test_one_that_passes_acquits_all_that_are_no_longer(statements: Statements, clock: Clock) -> None:
    for _ in range(20):
        clock.now += 5
        statements.lost(3 << 20)
        statements.passed(3 << 20)
    assert statements.most(SERVER) > 3 << 20


def test_the_losses_of_longer_ones_say_nothing_of_a_shorter_one(statements: Statements, clock: Clock) -> None:
    for size in (9, 9, 8, 8, 3):
        clock.now += 10
        statements.lost(size << 20)
    assert statements.most(SERVER) > 9 << 20
    clock.now += 10
    statements.lost(9 << 20)
    assert statements.most(SERVER) == (9 << 20) - 1


@given(st.lists(st.tuples(st.integers(), st.binary(max_size=300))), st.integers(0, 2000))
def test_portions_are_all_rows_in_order_and_within_the_share(
    rows: list[tuple[int, bytes]], share: int
) -> None:
    parts = list(portions(rows, share))
    assert [row for part in parts for row in part] == rows
    assert all(part and (len(part) == 1 or sum(map(bytes_at_most, part)) <= share) for part in parts)
