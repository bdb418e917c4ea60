"""Values as literals. tests/integration/test_storage_literals.py reads them back from real servers."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from services.common.database.literals import literal, literal_list, literal_rows


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NULL"),
        (True, "1"),
        (False, "0"),
        (0, "0"),
        (-(1 << 63), "-9223372036854775808"),
        ((1 << 64) - 1, "18446744073709551615"),
        ("", "''"),
        ("it's", "'it''s'"),
        ("\\'", "_utf8mb4 x'5c27'"),
        ("é\\", "_utf8mb4 x'c3a95c'"),
        ('"%s"', "'\"%s\"'"),
        (b"", "x''"),
        (b"\\'\0\xff", "x'5c2700ff'"),
        (datetime(2026, 11, 30, 22, 5), "'2026-11-30 22:05:00'"),
        (datetime(1, 1, 1, 0, 0, 0, 7), "'0001-01-01 00:00:00.000007'"),
    ],
)
def test_each_type_has_its_literal(value: object, text: str) -> None:
    assert literal(value) == text
    # A column with one value for all, with several of a type, and with several types.
    assert literal_list([value, value]) == f"{text},{text}"
    assert literal_list([value, "x", value]) == f"{text},'x',{text}"
    assert literal_list([value, None]) == f"{text},NULL"


@pytest.mark.parametrize(
    "value", [1.5, Decimal(1), bytearray(b"x"), [1], datetime(2026, 1, 1, tzinfo=UTC), object()]
)
def test_a_value_of_another_type_is_no_literal(value: object) -> None:
    for values in ([value], [value, value], [value, None]):
        with pytest.raises(TypeError, match="has no literal"):
            literal_list(values)


def test_true_is_no_number_among_numbers() -> None:
    assert literal_list([1, True, 1]) == "1,1,1"
    assert literal_list([0, False]) == "0,0"


def test_one_hostile_text_of_a_column_leaves_the_others_as_they_are() -> None:
    rows = [(1, "a"), (2, "b'"), (3, "c\\"), (4, "%s")]
    assert literal_rows(rows) == "(1,'a'),(2,'b'''),(3,_utf8mb4 x'635c'),(4,'%s')"


def test_a_row_may_have_more_than_its_values() -> None:
    assert literal_rows([(1, "%s"), (2, "")], "(%s,NOW(),%s)") == "(1,NOW(),'%s'),(2,NOW(),'')"


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        literal_rows([(1, 2), (3,)])
