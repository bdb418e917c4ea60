"""What `postroad replay` shows: its counts, before and after."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from services.cli.output import Column, Output, OutputFormat, OutputRow
from services.cli.terminal import say

if TYPE_CHECKING:
    from services.common.operations.replay.store import Counts

__all__ = ["produced_text", "show_counts", "show_result"]

_COLUMNS = (
    Column("status"),
    Column("reason", min_width=8),
    Column("records", align_right=True),
    Column("what", "becomes"),
)
# A task has several records on a topic if it was reopened or replayed.
_WITH_TASKS = (*_COLUMNS[:2], Column("tasks", align_right=True), *_COLUMNS[2:])


def produced_text(counts: Counts, tasks: Counts | None) -> str:
    """Return how many records are produced, and for how many tasks where that is known."""
    from services.common.operations.replay.store import count_produced  # noqa: PLC0415

    number = count_produced(counts)
    records = f"{number} record{'' if number == 1 else 's'}"
    if tasks is None:
        return records
    number = count_produced(tasks)
    return f"{records} of {number} task{'' if number == 1 else 's'}"


def _rows(counts: Counts, tasks: Counts | None = None) -> list[dict[str, Any]]:
    return [
        {"status": status, "reason": reason, "what": what, "records": number}
        | ({} if tasks is None else {"tasks": tasks[status, reason, what]})
        for (status, reason, what), number in sorted(counts.items())
    ]


def show_counts(counts: Counts, tasks: Counts | None) -> None:
    """Write the counts to stderr."""
    # The counts before the question are no result: they go where the question goes.
    with redirect_stdout(sys.stderr):
        _table(Output(OutputFormat.TABLE), counts, tasks)


def _table(out: Output, counts: Counts, tasks: Counts | None) -> None:
    columns = _COLUMNS if tasks is None else _WITH_TASKS
    out.rows(_rows(counts, tasks), columns, "There are no records.")


def show_result(
    out: Output, id_: str | None, counts: Counts, state: str, tasks: Counts | None = None
) -> None:
    """Write the result of a replay. `id_` is None where it produced nothing, `tasks` counts tasks."""
    from services.common.operations.replay.store import count_produced  # noqa: PLC0415

    rows = _rows(counts, tasks)
    row: dict[str, Any] = {
        "id": id_,
        "state": state,
        "records": sum(counts.values()),
        "produced": count_produced(counts),
        "counts": rows,
    }

    def table(_: OutputRow) -> None:
        _table(out, counts, tasks)
        verb = "would be" if state == "dry run" else "were"
        say(f"Of {row['records']} records, {produced_text(counts, tasks)} {verb} produced.")

    out.one(row, table)
