"""`postroad list`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from services.cli.command import API, CommandContext, command
from services.cli.errors import USAGE, Failure
from services.cli.filters import (
    Domain,
    Email,
    From,
    Labels,
    Reason,
    Statuses,
    To,
    creation_fields,
    filter_fields,
)
from services.cli.output import Column
from services.cli.terminal import say

__all__ = ["register"]

EXAMPLES = """
    postroad list
    postroad list --status failed --reason null_mx --from -2d
    postroad list --label list=news --domain example.org --count
    postroad list --status uncertain --all -o jsonl |
        jq -r .id | postroad retry -
"""
_PAGE_SIZE = 1000


def register(app: typer.Typer) -> None:
    """Add `list` to the app."""

    @command(app, "list", uses=(API,), examples=EXAMPLES)
    def list_(
        context: CommandContext,
        *,
        status: Statuses = None,
        email: Email = "",
        domain: Domain = "",
        reason: Reason = "",
        label: Labels = None,
        from_: From = "",
        to: To = "",
        limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show so many at most.")] = 50,
        all_: Annotated[bool, typer.Option("--all", help="Show all, page by page.")] = False,
        count: Annotated[
            bool, typer.Option("--count", help="Show how many there are of each status.")
        ] = False,
    ) -> None:
        """List tasks, newest first.

        All flags that choose tasks hold together. TIME is 2026-01-31T12:00:00Z, 2026-01-31 (UTC) or -2h.
        A narrow terminal shows fewer columns; -o json has everything.
        """
        fields = filter_fields(status, email, domain, reason, label) | creation_fields(from_, to)
        if count:
            if all_:
                raise Failure("--count counts all anyway: leave --all out", USAGE)
            _count(context, fields)
            return
        from services.cli.tasks import TASKS  # noqa: PLC0415

        more: list[bool] = []
        context.out.rows(_pages(context, fields, None if all_ else limit, more), TASKS, empty="No such task.")
        if more:
            say(f"There are more than {limit}: use --limit or --all.")


def _count(context: CommandContext, fields: dict[str, Any]) -> None:
    from postroad.v1.task_service_pb2 import CountRequest  # noqa: PLC0415
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.filters import TaskStatus  # noqa: PLC0415

    with context.channel() as channel:
        answer = TaskServiceStub(channel).Count(CountRequest(**fields), timeout=DEADLINE)
    counts = {str(one): answer.counts[one] for one in TaskStatus if one in answer.counts}
    rows = [{"status": name, "tasks": number} for name, number in (counts | {"total": answer.total}).items()]
    columns = (Column("status"), Column("tasks", align_right=True))
    context.out.one({"counts": counts, "total": answer.total}, lambda _: context.out.table(rows, columns))


def _pages(
    context: CommandContext, fields: dict[str, Any], limit: int | None, more: list[bool]
) -> Iterator[dict[str, Any]]:
    """Yield at most `limit` rows. Appends True to `more` if there are further ones."""
    from postroad.v1.task_service_pb2 import ListRequest  # noqa: PLC0415
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.tasks import task_row  # noqa: PLC0415

    left, token = limit, ""
    with context.channel() as channel:
        stub = TaskServiceStub(channel)
        while left is None or left > 0:
            size = _PAGE_SIZE if left is None else min(left, _PAGE_SIZE)
            page = stub.List(ListRequest(page_size=size, page_token=token, **fields), timeout=DEADLINE)
            yield from map(task_row, page.results)
            left = None if left is None else left - len(page.results)
            token = page.next_page_token
            if not token:
                return
        more.append(True)
