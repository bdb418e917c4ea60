"""What `postroad replay` shows: what becomes of the records, counted, and its result."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from services.cli.output import Column, Form, Output, Row
from services.cli.terminal import say

if TYPE_CHECKING:
    from services.cli.replay.store import Counts

__all__ = ["produced", "refused", "result", "show", "told"]

_COLUMNS = (
    Column("status"),
    Column("reason", least=8),
    Column("records", right=True),
    Column("what", "becomes"),
)
# A task may have several records on a topic: it was opened again, or replayed.
_SURVEYED = (*_COLUMNS[:2], Column("tasks", right=True), *_COLUMNS[2:])


def produced(counts: Counts) -> int:
    """Return how many of the records are produced again."""
    from services.cli.replay.decide import What  # noqa: PLC0415

    return sum(number for (_, _, what), number in counts.items() if What(what).produced)


def refused(counts: Counts) -> int:
    """Return how many of the records could not be produced."""
    from services.cli.replay.decide import What  # noqa: PLC0415

    return sum(number for (_, _, what), number in counts.items() if What(what) is What.REFUSED)


def told(counts: Counts, tasks: Counts | None) -> str:
    """Return how many records are produced, and of how many tasks where that is known."""
    number = produced(counts)
    records = f"{number} record{'' if number == 1 else 's'}"
    if tasks is None:
        return records
    number = produced(tasks)
    return f"{records} of {number} task{'' if number == 1 else 's'}"


def _rows(counts: Counts, tasks: Counts | None = None) -> list[dict[str, Any]]:
    return [
        {"status": status, "reason": reason, "what": what, "records": number}
        | ({} if tasks is None else {"tasks": tasks[status, reason, what]})
        for (status, reason, what), number in sorted(counts.items())
    ]


def show(counts: Counts, tasks: Counts | None) -> None:
    """Write the counts to stderr."""
    # What is shown before the question is no result: it goes where the question goes.
    with redirect_stdout(sys.stderr):
        _table(Output(Form.TABLE), counts, tasks)


def _table(out: Output, counts: Counts, tasks: Counts | None) -> None:
    columns = _COLUMNS if tasks is None else _SURVEYED
    out.rows(_rows(counts, tasks), columns, "There are no records.")


def result(out: Output, id_: str | None, counts: Counts, state: str, tasks: Counts | None = None) -> None:
    """Write the result of a replay; `id_` None: of one that produced nothing; `tasks`: the tasks' numbers."""
    rows = _rows(counts, tasks)
    row: dict[str, Any] = {
        "id": id_,
        "state": state,
        "records": sum(counts.values()),
        "produced": produced(counts),
        "counts": rows,
    }

    def table(_: Row) -> None:
        _table(out, counts, tasks)
        verb = "would be" if state == "dry run" else "were"
        say(f"Of {row['records']} records, {told(counts, tasks)} {verb} produced.")

    out.one(row, table)
