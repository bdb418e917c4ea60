"""`postroad rebuild`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.command import DATABASE, KAFKA, CommandContext, command
from services.cli.errors import FAILED, UNAVAILABLE, Failure
from services.cli.output import Column, OutputRow
from services.cli.terminal import progress, say
from services.cli.times import format_time

if TYPE_CHECKING:
    from services.common.operations.rebuild.report import RebuildReport

__all__ = ["register"]

_SAMPLES = (
    Column("table"),
    Column("task"),
    Column("kind"),
    Column("line", min_width=12, rank=2),
    Column("columns", min_width=12, rank=1),
)
_GONE = (
    Column("topic"),
    Column("cause"),
    Column("records", align_right=True),
    Column("since", format=format_time),
)
_TITLES = {
    "events": "events folded",
    "undecodable": "records that do not decode",
    "refused": "tasks that the database refuses",
    "tasks": "tasks",
    "missing": "  missing from the table",
    "differing": "  differing",
    "extra": "  unknown to the topics, kept",
    "recorded": "  recorded and not published yet",
    "older": "  older than the topics, kept",
    "kept": "  ahead of the topics, kept",
    "partial": "  without recipient: their task.created is gone",
    "lines_missing": "timeline lines missing",
    "lines_differing": "timeline lines differing",
    "lines_extra": "timeline lines unknown to the topics, kept",
    "bodies": "bodies missing",
    "deliveries": "deliveries missing",
    "swapped": "swapped in",
    "seconds": "seconds",
}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""

    @command(
        app,
        "rebuild",
        uses=(KAFKA, DATABASE),
        examples="""
            postroad rebuild
            postroad rebuild --yes
            postroad rebuild -o json
        """,
    )
    def rebuild(
        context: CommandContext,
        yes: Annotated[
            bool, typer.Option("--yes", "-y", help="Put what was rebuilt in the tables' place.")
        ] = False,
    ) -> None:
        """Build the task table anew from the topics, and compare it with the present one.

        It compares every row and every column of tasks and timelines. Without --yes it changes nothing. With
        --yes the new tables replace the present ones, and missing bodies and deliveries are restored. Without
        POSTROAD_BODY_RETENTION, a body that a settled task lacks counts as deleted by the services. The
        services may run meanwhile. What the topics no longer hold stays as it is. A topic that was recreated
        or truncated, or that lacks records, is named with what it lacks.

        Exit code 1: something differs, and was left so.
        """
        from services.common.operations.rebuild.run import rebuild as run  # noqa: PLC0415
        from services.common.operations.rebuild.swap_tables import TableBusy  # noqa: PLC0415

        try:
            with progress("rebuild") as bar:
                report = run(context.settings(), yes, bar)
        except TableBusy as error:
            raise Failure(f"{error}; run it again", UNAVAILABLE) from None
        context.out.one(_row(report), lambda row: _show(context, row, yes))
        if report.gone:
            say("The topics do not hold everything that the tables know; that stays in the tables as it is.")
        if not report.equal and not yes:
            say("The tables are not what the topics make of them; --yes exchanges them.")
            say("What the status stage has not folded yet differs as well: see postroad lag.")
            raise typer.Exit(FAILED)


def _row(report: RebuildReport) -> dict[str, Any]:
    row = asdict(report)
    row["samples"] = [
        asdict(sample) | {"task": str(sample.task), "columns": list(sample.columns)}
        for sample in report.samples
    ]
    row["gone"] = [
        asdict(gone) | {"since": None if gone.since is None else f"{gone.since.isoformat()}Z"}
        for gone in report.gone
    ]
    row["seconds"] = round(report.seconds, 3)
    return row


def _show(context: CommandContext, row: OutputRow, yes: bool) -> None:
    always = {"events", "tasks", "missing", "differing", "swapped", "seconds"}
    titles = dict(_TITLES)
    if yes:
        titles |= {"bodies": "bodies restored", "deliveries": "deliveries restored"}
        if not any(
            row[key] for key in ("swapped", "missing", "differing", "lines_missing", "lines_differing")
        ):
            # There was nothing to exchange.
            always.discard("swapped")
    context.out.values(row, {key: title for key, title in titles.items() if key in always or row[key]})
    for key, columns in (("gone", _GONE), ("samples", _SAMPLES)):
        if row[key]:
            print()
            context.out.table(row[key], columns)
    differing = ("missing", "differing", "extra", "lines_missing", "lines_differing", "lines_extra")
    if row["samples"] and (more := sum(row[key] for key in differing) - len(row["samples"])) > 0:
        print(f"... and {more} more")
