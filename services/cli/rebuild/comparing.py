"""The originals against the rebuilt tables, row by row and every column, while both still move.

A row that differs may only be on its way: folded in one of the tables and not yet in the other. So what
differs is noted by its key first, and struck off as soon as it was seen to be equal once.

All functions work on the caller's connection and block.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from sqlalchemy import Connection

from services.cli.rebuild.pairs import PAIRS, Pair, Range, flat, ranges

__all__ = ["Difference", "Kind", "count", "note", "samples", "strike_off"]

_PART = 500

Kind = Literal["missing", "differs", "extra"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that is not equal. `missing`: only the topics know it, `extra`: they know nothing of it.

    `columns`: those that differ.
    """

    table: str
    task: UUID
    line: str
    kind: Kind
    columns: tuple[str, ...]


_KIND = {
    pair: f"IF({pair.name}.{pair.id} IS NULL, 'missing',"
    f" IF({pair.shadow}.{pair.id} IS NULL, 'extra', 'differs'))"
    for pair in PAIRS
}
_BOTH = {
    pair: f"FROM {pair.found} LEFT JOIN {pair.name} ON {pair.joined(pair.found, pair.name)}"
    f" LEFT JOIN {pair.shadow} ON {pair.joined(pair.found, pair.shadow)}"
    for pair in PAIRS
}


def note(connection: Connection, pair: Pair, range_: Range) -> None:
    """Note the keys of the rows of this range that are not in both tables, or not equal."""
    keys = ", ".join(pair.key)
    for one, other, unless in (
        (pair.shadow, pair.name, f"NOT ({pair.same(pair.name, pair.shadow)})"),
        (pair.name, pair.shadow, "FALSE"),
    ):
        chosen = ", ".join(f"{one}.{column}" for column in pair.key)
        where, parameters = range_.where(f"{one}.{pair.id}")
        connection.exec_driver_sql(
            f"INSERT IGNORE INTO {pair.found} ({keys}) SELECT {chosen} FROM {one}"
            f" LEFT JOIN {other} ON {pair.joined(one, other)}"
            f" WHERE {where} AND ({other}.{pair.id} IS NULL OR {unless})",
            parameters,
        )


def strike_off(connection: Connection, pair: Pair) -> int:
    """Strike off the rows that are equal now; return how many are left."""
    chosen = ", ".join(f"{pair.found}.{column}" for column in pair.key)
    left = 0
    for range_ in ranges(connection, pair.found, pair.id):
        where, parameters = range_.where(f"{pair.found}.{pair.id}")
        equal = connection.exec_driver_sql(
            f"SELECT {chosen} FROM {pair.found} JOIN {pair.name} ON {pair.joined(pair.found, pair.name)}"
            f" JOIN {pair.shadow} ON {pair.joined(pair.found, pair.shadow)}"
            f" WHERE {where} AND {pair.same(pair.name, pair.shadow)}",
            parameters,
        ).all()
        for start in range(0, len(equal), _PART):
            keys = [tuple(key) for key in equal[start : start + _PART]]
            connection.exec_driver_sql(
                f"DELETE FROM {pair.found} WHERE {pair.matching(len(keys))}", flat(keys)
            )
        query = f"SELECT COUNT(*) FROM {pair.found} WHERE {where}"
        left += int(connection.exec_driver_sql(query, parameters).scalar_one())
    return left


def count(connection: Connection, pair: Pair) -> Counter[Kind]:
    """Return how many of the noted rows there are of each kind."""
    counted: Counter[Kind] = Counter()
    for range_ in ranges(connection, pair.found, pair.id):
        where, parameters = range_.where(f"{pair.found}.{pair.id}")
        query = f"SELECT {_KIND[pair]}, COUNT(*) {_BOTH[pair]} WHERE {where} GROUP BY 1"
        for kind, rows in connection.exec_driver_sql(query, parameters):
            counted[kind] += rows
    return counted


def samples(connection: Connection, pair: Pair, most: int) -> list[Difference]:
    """Return the first of the noted rows, with what differs."""
    keys = ", ".join(f"{pair.found}.{column}" for column in pair.key)
    equal = ", ".join(pair.equal(column, pair.name, pair.shadow) for column in pair.columns)
    found = connection.exec_driver_sql(
        f"SELECT {_KIND[pair]}, {keys}, {equal} {_BOTH[pair]} ORDER BY {keys} LIMIT {most:d}"
    )
    differences = []
    for kind, id_, *rest in found:
        line = str(rest[0]) if len(pair.key) > 1 else ""
        flags = zip(pair.columns, rest[len(pair.key) - 1 :], strict=True)
        columns = tuple(column for column, same in flags if not same) if kind == "differs" else ()
        differences.append(Difference(pair.name, UUID(bytes=bytes(id_)), line, kind, columns))
    return differences
