"""Values as literals in the text of a statement.

A literal is safe whatever the session's `sql_mode` and character set are. Bytes are hexadecimal. In a quoted
text only the quote itself has a meaning, and is doubled. What a backslash means depends on
NO_BACKSLASH_ESCAPES, so a text with one is hexadecimal as well. (MySQL Reference Manual, "String Literals",
"Hexadecimal Literals"; MariaDB has both.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

__all__ = ["literal", "literal_list", "literal_rows"]


def _text(value: str) -> str:
    if "\\" in value:
        return f"_utf8mb4 x'{value.encode().hex()}'"
    return "'" + value.replace("'", "''") + "'"


def _bytes(value: bytes) -> str:
    return f"x'{value.hex()}'"


def _time(value: datetime) -> str:
    if value.tzinfo is not None:
        raise TypeError("a time with a zone has no literal")
    return f"'{value.isoformat(' ')}'"


_LITERALS: Mapping[type, Callable[..., str]] = {
    type(None): lambda value: "NULL",
    bool: lambda value: "1" if value else "0",
    int: int.__repr__,
    str: _text,
    bytes: _bytes,
    datetime: _time,
}


def literal(value: object) -> str:
    """Return a value as a literal: None, a bool, an int, a str, bytes or a datetime (naive, in UTC).

    Raises TypeError for another type, and UnicodeEncodeError for a text with surrogates.
    """
    kind = type(value)
    make = _LITERALS.get(kind)
    if make is None:
        raise TypeError(f"{kind.__name__} has no literal")
    return make(value)


def literal_list(values: Iterable[object]) -> str:
    """Return the literals of `values`, with commas between them, for `IN (...)`."""
    return ",".join(_column(tuple(values)))


def literal_rows(rows: Iterable[Sequence[object]], row: str | None = None) -> str:
    """Return the literals of `rows` as `(...),(...)`, for VALUES. All rows have the same length.

    `row` is the text of one row with a `%s` for each value, where the row has more than its values.
    """
    # Column by column: the values of a column have one type, and often one value.
    texts = zip(*map(_column, zip(*rows, strict=True)), strict=True)
    if row is not None:
        return ",".join([row % text for text in texts])
    return "(" + "),(".join(map(",".join, texts)) + ")"


def _column(values: tuple[object, ...]) -> Iterable[str]:
    """Return the literal of each value."""
    kinds = set(map(type, values))
    if len(kinds) != 1:
        return map(literal, values)
    first = values[0]
    if len(values) > 1 and values[-1] == first and values.count(first) == len(values):
        return [literal(first)] * len(values)
    if str in kinds:
        together = "".join(values)  # type: ignore[arg-type]
        if "'" not in together and "\\" not in together:
            return [f"'{value}'" for value in values]
    return map(_LITERALS.get(kinds.pop(), literal), values)
