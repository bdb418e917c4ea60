"""`postroad get`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.command import API, CommandContext, command
from services.cli.output import OutputRow, safe_text
from services.cli.terminal import say

__all__ = ["register"]

EXAMPLES = """
    postroad get 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071
    postroad get 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071 --body
    postroad get 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071 -o json | jq .timeline
"""


def register(app: typer.Typer) -> None:
    """Add `get` to the app."""

    @command(app, "get", uses=(API,), examples=EXAMPLES)
    def get(
        context: CommandContext,
        id_: Annotated[str, typer.Argument(help="The task's id.", metavar="ID")],
        body: Annotated[bool, typer.Option("--body", help="Show the mail's parts too.")] = False,
    ) -> None:
        """Show one task and what happened to it.

        The last table is its timeline: every attempt with the mail server's reply. -o json has everything.
        """
        from postroad.v1.task_service_pb2 import GetRequest  # noqa: PLC0415
        from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
        from services.cli.channel import DEADLINE  # noqa: PLC0415
        from services.cli.tasks import TIMELINE, full_row  # noqa: PLC0415

        with context.channel() as channel:
            row = full_row(TaskServiceStub(channel).Get(GetRequest(id=id_), timeout=DEADLINE))

        def show(row: OutputRow) -> None:
            context.out.values({key: row[key] for key in row if key not in {"body", "html", "timeline"}})
            if row["timeline"]:
                print()
                context.out.table(row["timeline"], TIMELINE)
            else:
                say("No event of it is folded yet: see 'postroad lag --stage status'.")
            for part in ("body", "html"):
                if body and row[part]:
                    print(f"\n{safe_text(row[part])}".rstrip("\n"))

        context.out.one(row, show)
