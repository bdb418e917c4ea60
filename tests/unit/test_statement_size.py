"""The limits of a statement's length."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mysql.connector import Error

from services.common.database.literals import literal_rows
from services.common.database.statement_size import (
    LONG_STATEMENT,
    PACKET_TOO_LARGE,
    StatementLimits,
    StatementTooLong,
    max_row_bytes,
    max_statement_bytes,
    split_by_bytes,
)

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
def statements(clock: Clock) -> StatementLimits:
    return StatementLimits(clock)


@pytest.mark.parametrize("server", [1024, 1 << 20, SERVER, 1 << 30])
def test_a_statement_is_shorter_than_what_the_server_takes(statements: StatementLimits, server: int) -> None:
    assert server // 2 <= max_statement_bytes(server) < server
    assert statements.multi_row_bytes() is None


class Driver:
    """A driver's connection. The server answers each statement with `error`, or accepts it."""

    def __init__(self) -> None:
        self.error: Error | None = None
        self.sent = 0

    def cmd_query(self, query: bytes) -> None:
        self.sent += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def driver(statements: StatementLimits) -> Driver:
    driver = Driver()
    statements.guard(driver, SERVER)
    return driver


def test_a_refused_statement_of_several_rows_is_halved_for_a_while(
    statements: StatementLimits, driver: Driver, clock: Clock
) -> None:
    driver.error = Error(errno=PACKET_TOO_LARGE)
    with statements.multi_row(), pytest.raises(Error) as caught:
        driver.cmd_query(bytes(5 << 20))
    assert not isinstance(caught.value, StatementTooLong)
    assert statements.multi_row_bytes() == 5 << 19
    with statements.multi_row(), pytest.raises(Error):
        driver.cmd_query(bytes(1000))
    assert statements.multi_row_bytes() == 500
    clock.now += 601
    assert statements.multi_row_bytes() is None


def test_a_single_row_is_always_sent_if_the_server_takes_it(driver: Driver, clock: Clock) -> None:
    longest = bytes(max_statement_bytes(SERVER))
    driver.error = Error(errno=2013)
    for _ in range(20):
        clock.now += 5
        with pytest.raises(Error):
            driver.cmd_query(longest)
    driver.error = Error(errno=PACKET_TOO_LARGE)
    with pytest.raises(StatementTooLong):
        driver.cmd_query(longest)
    assert driver.sent == 21
    driver.error = None
    driver.cmd_query(longest)
    with pytest.raises(StatementTooLong, match="max_allowed_packet"):
        driver.cmd_query(longest + b"x")
    assert driver.sent == 22


def test_a_single_row_is_too_long_once_it_was_lost_for_long_enough(driver: Driver, clock: Clock) -> None:
    driver.error = Error(errno=2013)
    for _ in range(4):
        with pytest.raises(Error) as caught:
            driver.cmd_query(bytes(3 << 20))
        assert not isinstance(caught.value, StatementTooLong)
        clock.now += 5
    with pytest.raises(StatementTooLong, match="max_allowed_packet"):
        driver.cmd_query(bytes(3 << 20))
    driver.error = None
    driver.cmd_query(bytes(3 << 20))
    driver.error = Error(errno=2013)
    with pytest.raises(Error) as caught:
        driver.cmd_query(bytes(3 << 20))
    assert not isinstance(caught.value, StatementTooLong)


def test_each_loss_halves_the_limit_of_statements_with_several_rows(
    statements: StatementLimits, clock: Clock
) -> None:
    statements.record_loss(12 << 20)
    assert statements.multi_row_bytes() == 6 << 20
    statements.record_loss(12 << 20)  # it was sent before, or it is a single row
    assert statements.multi_row_bytes() == 6 << 20
    statements.record_loss(5 << 20)
    assert statements.multi_row_bytes() == 5 << 19
    for _ in range(5):
        statements.record_loss(LONG_STATEMENT + 1)
    assert statements.multi_row_bytes() == LONG_STATEMENT
    clock.now += 601
    assert statements.multi_row_bytes() is None


def test_recent_losses_over_some_time_show_that_a_statement_is_too_long(
    statements: StatementLimits, clock: Clock
) -> None:
    # All at one time: the server may just have gone away.
    assert not any(statements.record_loss(3 << 20) for _ in range(20))
    clock.now += 21
    assert statements.record_loss(3 << 20)
    clock.now += 601
    assert not statements.record_loss(3 << 20)


def test_a_success_clears_the_losses_of_shorter_statements(statements: StatementLimits, clock: Clock) -> None:
    for _ in range(20):
        clock.now += 5
        assert not statements.record_loss(3 << 20)
        statements.record_success(3 << 20)


def test_losses_of_longer_statements_do_not_concern_a_shorter_one(
    statements: StatementLimits, clock: Clock
) -> None:
    for size in (9, 9, 8, 8, 3):
        clock.now += 10
        assert not statements.record_loss(size << 20)
    clock.now += 10
    assert statements.record_loss(9 << 20)


@given(st.lists(st.tuples(st.integers(), st.binary(max_size=300))), st.integers(0, 2000))
def test_the_runs_have_all_rows_in_order_within_the_limit(rows: list[tuple[int, bytes]], limit: int) -> None:
    parts = list(split_by_bytes(rows, limit))
    assert [row for part in parts for row in part] == rows
    assert all(part and (len(part) == 1 or sum(map(max_row_bytes, part)) <= limit) for part in parts)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.binary(max_size=40),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(st.sampled_from("'\"\\\0\n\r\x1aé\U0001f4ee"), max_size=40),
    st.datetimes(datetime(1970, 1, 1)),
)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_the_bytes_of_a_row_are_never_more_than_estimated(row: list[object]) -> None:
    assert len(literal_rows([row]).encode()) + len(",") <= max_row_bytes(row)
