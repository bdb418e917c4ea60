"""`postroad watch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.command import API, CommandContext, command
from services.cli.errors import FAILED, USAGE, Failure
from services.cli.filters import Domain, Email, Labels, Reason, Statuses, filter_fields
from services.cli.output import Column, OutputRow
from services.cli.times import format_time_ms

__all__ = ["register"]

EXAMPLES = """
    postroad watch 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071
    postroad watch --status failed --label list=news
    postroad watch -o jsonl | jq -c '[.task.id, .change.kind, .change.reply]'
    id=$(postroad create ada@example.org -S Hello -b Hi -o json | jq -r .id)
    postroad watch $id --exit-status --timeout 60 && echo sent
"""
_CHANGES = (
    Column("at", format=format_time_ms, usual_width=24),
    Column("id", usual_width=36),
    Column("status", usual_width=10),
    Column("kind", "what", usual_width=9, rank=3),
    Column("email", min_width=12, rank=1, usual_width=28),
    Column("detail", min_width=14, rank=2, usual_width=60),
)


def register(app: typer.Typer) -> None:
    """Add `watch` to the app."""

    @command(app, "watch", uses=(API,), examples=EXAMPLES)
    def watch(
        context: CommandContext,
        *,
        id_: Annotated[str, typer.Argument(help="One task; otherwise the flags choose.", metavar="ID")] = "",
        status: Statuses = None,
        email: Email = "",
        domain: Domain = "",
        reason: Reason = "",
        label: Labels = None,
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Go on when the task is settled.")
        ] = False,
        exit_status: Annotated[
            bool, typer.Option("--exit-status", help="Exit with 1 where the task ends other than completed.")
        ] = False,
        timeout: Annotated[
            float | None,
            typer.Option(
                min=0.1, help="Give up after so many seconds, with exit code 1.", show_default=False
            ),
        ] = None,
        resume: Annotated[
            str,
            typer.Option(
                help="Go on after the message with this resume_token.", metavar="TOKEN", show_default=False
            ),
        ] = "",
    ) -> None:
        """Show what happens to tasks as it happens: to one until it is settled, or to those chosen.

        When the connection breaks it goes on where it was, and misses nothing. -o json and jsonl write an
        object a line.
        """
        from services.cli.watching import ResumableWatch, is_settled  # noqa: PLC0415

        fields = {
            key: value for key, value in filter_fields(status, email, domain, reason, label).items() if value
        }
        if id_ and fields:
            raise Failure("either an ID or flags that choose tasks, not both", USAGE)
        if not id_ and (follow or exit_status):
            raise Failure("--follow and --exit-status are for one task: name its ID", USAGE)
        write = context.out.row_writer(_CHANGES)
        last = ""
        with context.channel() as channel:
            watched = fields | ({"id": id_} if id_ else {})
            rows = ResumableWatch(channel, watched, resume, timeout).rows()
            for row in rows:
                write(_table_row(row) if context.out.is_table else row)
                last = row["task"]["status"]
                if id_ and not follow and is_settled(row):
                    break
        if exit_status and last != "completed":
            raise typer.Exit(FAILED)


def _table_row(row: OutputRow) -> dict[str, Any]:
    task, change = row["task"], row["change"]
    if change is None:
        detail = task["reply"] or task["reason"]
        return {**task, "at": task["updated_at"], "kind": "", "detail": detail}
    detail = change["reply"] or change["detail"]
    return {**task, "at": change["at"], "kind": change["kind"], "detail": detail}
