"""What `postroad replay` shows: what becomes of the records, counted, and its result."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from services.cli.output import Column, Form, Output, Row
from services.cli.terminal import say

if TYPE_CHECKING:
    from services.cli.replay.store import Counts

__all__ = ["produced", "refused", "result", "show"]

_COLUMNS = (
    Column("status"),
    Column("reason", least=8),
    Column("records", right=True),
    Column("what", "becomes"),
)


def produced(counts: Counts) -> int:
    """Return how many of the records are produced again."""
    from services.cli.replay.decide import What  # noqa: PLC0415

    return sum(number for (_, _, what), number in counts.items() if What(what).produced)


def refused(counts: Counts) -> int:
    """Return how many of the records could not be produced."""
    from services.cli.replay.decide import What  # noqa: PLC0415

    return sum(number for (_, _, what), number in counts.items() if What(what) is What.REFUSED)


def _rows(counts: Counts) -> list[dict[str, Any]]:
    return [
        {"status": status, "reason": reason, "what": what, "records": number}
        for (status, reason, what), number in sorted(counts.items())
    ]


def show(counts: Counts) -> None:
    """Write the counts to stderr."""
    # What is shown before the question is no result: it goes where the question goes.
    with redirect_stdout(sys.stderr):
        Output(Form.TABLE).rows(_rows(counts), _COLUMNS, "There are no records.")


def result(out: Output, id_: str | None, counts: Counts, state: str) -> None:
    """Write the result of a replay; `id_` None: of one that produced nothing."""
    rows = _rows(counts)
    row: dict[str, Any] = {
        "id": id_,
        "state": state,
        "records": sum(counts.values()),
        "produced": produced(counts),
        "counts": rows,
    }

    def table(_: Row) -> None:
        out.rows(rows, _COLUMNS, "There are no records.")
        verb = "would be" if state == "dry run" else "were"
        say(f"{row['records']} records, of which {row['produced']} {verb} produced.")

    out.one(row, table)
