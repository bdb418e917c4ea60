"""Hostile values reach real servers as they are, whatever the session's settings."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection

from services.common.database.bulk import execute, execute_rows, select_rows
from services.common.database.engine import make_engine
from tests.forms import by_form

HOSTILE = [
    "",
    "'",
    "''",
    "\\",
    "\\'",
    "\\\\'",
    "\\\\",
    "'; DROP TABLE hostile; -- ",
    "\\'; DROP TABLE hostile; -- ",
    "' OR '1'='1",
    "%s %d %(a)s %% %",
    "_utf8mb4 x'41'",
    '/*! SELECT 1 */ # `"',
    "delimiter //",
    "\0\x1a\b\r\n\t",
    "".join(map(chr, range(256))),
    "\u00bf\u5c27\u2028\ufeff\ufffd\U0001f4ee",  # in other character sets some of these bytes are a quote
    "a ",
    "x" * 70_000,
]
_TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.sampled_from("'\"\\\0%s\r\n\x1aé\U0001f4ee;-"), max_size=30),
    st.sampled_from(HOSTILE),
)
_BYTES = st.one_of(st.binary(max_size=40), st.sampled_from([text.encode() for text in HOSTILE]))
_ROWS = st.tuples(
    st.none() | _TEXTS,
    st.none() | _BYTES,
    st.none() | st.integers(-(1 << 63), (1 << 63) - 1) | st.booleans(),
    st.integers(0, (1 << 64) - 1),
    st.none() | st.datetimes(datetime(1000, 1, 1)),
)
_MODES = ["", "NO_BACKSLASH_ESCAPES", "ANSI"]


@pytest.fixture(scope="module", params=["mysql", "mariadb"])
def connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """One session for all examples, with an empty table."""
    url = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb").new_database()
    engine = make_engine(url)
    with engine.connect() as connection:
        execute(
            connection,
            "CREATE TABLE hostile (n INT PRIMARY KEY, a LONGTEXT, b LONGBLOB, c BIGINT, d BIGINT UNSIGNED,"
            " e DATETIME(6)) ENGINE=InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
        )
        yield connection
    engine.dispose()


def read_back(connection: Connection, rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    execute(connection, "DELETE FROM hostile")
    execute_rows(connection, "INSERT INTO hostile (n, a, b, c, d, e) VALUES",
                 [(n, *row) for n, row in enumerate(rows)])  # fmt: skip
    found = select_rows(connection, "SELECT a, b, c, d, e FROM hostile ORDER BY n")
    connection.rollback()
    return [(a, None if b is None else bytes(b), c, d, e) for a, b, c, d, e in found]


@settings(
    max_examples=by_form(40, 400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(_ROWS, min_size=1, max_size=6), st.sampled_from(_MODES))
@example([(text, text.encode(), 1, 1, None) for text in HOSTILE], "")
@example([(text, text.encode(), 1, 1, None) for text in HOSTILE], "NO_BACKSLASH_ESCAPES")
@example([(None, bytes([byte]), 1, 1, None) for byte in range(256)], "ANSI")
def test_rows_are_read_back_as_they_were_written(
    connection: Connection, rows: list[tuple[object, ...]], mode: str
) -> None:
    execute(connection, "SET sql_mode = %s", (mode,))
    assert read_back(connection, rows) == rows


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("text", HOSTILE)
def test_a_parameter_is_one_value(connection: Connection, mode: str, text: str) -> None:
    execute(connection, "SET sql_mode = %s", (mode,))
    [(found, length, rest)] = select_rows(
        connection, "SELECT %s, OCTET_LENGTH(%s), 100 %% 7", (text, text.encode())
    )
    assert (found, length, rest) == (text, len(text.encode()), 2)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff'", "\\\udc80"])
def test_a_text_with_surrogates_is_never_sent(connection: Connection, text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        read_back(connection, [(text, b"", 1, 1, None)])
    assert select_rows(connection, "SELECT 1") == [(1,)]
    connection.rollback()


@pytest.mark.parametrize("charset", ["gbk", "sjis", "big5"])
def test_a_session_with_another_character_set_keeps_quotes_closed(
    connection: Connection, charset: str
) -> None:
    """There the last byte of a character may be a backslash, never a quote."""
    if not select_rows(connection, f"SHOW CHARACTER SET LIKE '{charset}'"):
        pytest.skip(f"the server has no {charset}")
    execute(connection, f"SET NAMES {charset}")
    try:
        for text in ("\u00bf'", "\u8868'; DROP TABLE hostile; -- ", "\u529f\\'"):
            [row] = select_rows(connection, "SELECT 1, 2, LENGTH(%s) > 0", (text,))
            assert row == (1, 2, 1)
    finally:
        execute(connection, "SET NAMES utf8mb4 COLLATE utf8mb4_general_ci")
