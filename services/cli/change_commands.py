"""`postroad retry`, `postroad cancel` and `postroad resolve`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from services.cli.command import API, CommandContext, command
from services.cli.errors import DENIED, FAILED, OK, UNAVAILABLE, explain
from services.cli.output import Column
from services.cli.terminal import say

if TYPE_CHECKING:
    from postroad.v1 import task_pb2
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub

__all__ = ["register"]

Ids: TypeAlias = Annotated[
    list[str], typer.Argument(help="The tasks' ids; -: those on stdin, one a line.", metavar="ID")
]
Call: TypeAlias = "Callable[[TaskServiceStub, str], task_pb2.Task]"

_ENDS_COMMAND = frozenset({DENIED, UNAVAILABLE})
_NOT_CANCELLED = {
    "completed": "not cancelled: its mail went out",
    "failed": "not cancelled: it had failed",
    "uncertain": "not cancelled: its mail may have gone out",
}
_CHANGED = (
    Column("id"),
    Column("status"),
    Column("email", min_width=12, rank=1),
    Column("reason", min_width=8, rank=2),
)


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""

    @command(
        app,
        "retry",
        uses=(API,),
        examples="""
            postroad retry 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071
            postroad list --status failed --reason rejected --all -o jsonl |
                jq -r .id | postroad retry -
        """,
    )
    def retry(context: CommandContext, ids: Ids) -> None:
        """Open failed, uncertain or cancelled tasks again.

        They are pending again and continue at once, or at their --send-at if that is still to come. A task
        whose mail went out is not opened. A task that is not opened is named with the reason, and counts as
        failed. The exit code is the highest of the tasks' own.
        """
        from postroad.v1.task_service_pb2 import RetryRequest  # noqa: PLC0415
        from services.cli.channel import DEADLINE  # noqa: PLC0415

        def call(stub: TaskServiceStub, id_: str) -> task_pb2.Task:
            return stub.Retry(RetryRequest(id=id_), timeout=DEADLINE)

        _change_each(context, ids, call)

    @command(
        app,
        "cancel",
        uses=(API,),
        examples="""
            postroad cancel 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071
            postroad list --status pending --label list=news --all -o jsonl |
                jq -r .id | postroad cancel -
        """,
    )
    def cancel(context: CommandContext, ids: Ids) -> None:
        """Cancel tasks, and show what really happened to each.

        If the sender was first, the task is completed, failed or uncertain. It is named with the reason, and
        counts as failed. So does a task whose mail is being sent: it is not cancelled, ask again. A task that
        is uncertain already is closed. The exit code is the highest of the tasks' own.
        """
        from postroad.v1.task_service_pb2 import CancelRequest  # noqa: PLC0415
        from services.cli.channel import DEADLINE  # noqa: PLC0415

        def call(stub: TaskServiceStub, id_: str) -> task_pb2.Task:
            return stub.Cancel(CancelRequest(id=id_), timeout=DEADLINE)

        _change_each(context, ids, call, lambda task: _NOT_CANCELLED.get(task.status))

    @command(
        app,
        "resolve",
        uses=(API,),
        examples="""
            postroad resolve 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071 --sent
            postroad resolve 019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071 --not-sent
        """,
    )
    def resolve(
        context: CommandContext,
        ids: Ids,
        sent: Annotated[
            bool | None,
            typer.Option("--sent/--not-sent", help="Whether the mail went out.", show_default=False),
        ] = None,
    ) -> None:
        """Record what became of uncertain tasks' mails.

        With --sent the tasks are completed and never sent again. With --not-sent they are failed and can be
        retried. A task that is not uncertain counts as failed. The exit code is the highest of the tasks'
        own.
        """
        from postroad.v1 import task_service_pb2 as pb  # noqa: PLC0415
        from services.cli.channel import DEADLINE  # noqa: PLC0415

        if sent is None:
            raise typer.BadParameter("say --sent or --not-sent", param_hint="--sent / --not-sent")
        resolution = pb.RESOLUTION_SENT if sent else pb.RESOLUTION_NOT_SENT

        def call(stub: TaskServiceStub, id_: str) -> task_pb2.Task:
            return stub.Resolve(pb.ResolveRequest(id=id_, resolution=resolution), timeout=DEADLINE)

        _change_each(context, ids, call)


def _change_each(
    context: CommandContext,
    ids: list[str],
    call: Call,
    refusal: Callable[[task_pb2.Task], str | None] = lambda _: None,
) -> None:
    """Call the api for each task and show the answers. Ends early where the api is away or denies access.

    `refusal` returns why an answered task counts as failed, None where it does not.
    """
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415

    worst = OK

    def rows() -> Iterator[dict[str, Any]]:
        import grpc  # noqa: PLC0415

        from services.cli.tasks import task_row  # noqa: PLC0415

        nonlocal worst
        with context.channel() as channel:
            stub = TaskServiceStub(channel)
            for id_ in _unique_ids(ids):
                try:
                    task = call(stub, id_)
                    if why := refusal(task):
                        say(f"postroad: {id_}: {why}")
                        worst = max(worst, FAILED)
                    yield task_row(task)
                except grpc.RpcError as error:
                    cause = explain(error)
                    if cause is None or cause.code in _ENDS_COMMAND or error.code().name == "UNIMPLEMENTED":
                        raise
                    say(f"postroad: {id_}: {cause.line}")
                    worst = max(worst, cause.code)
                    yield {"id": id_, "error": {"code": error.code().name, "message": cause.line}}

    shown = (row for row in rows() if not context.out.is_table or "error" not in row)
    context.out.rows(shown, _CHANGED)
    if worst:
        raise typer.Exit(worst)


def _unique_ids(ids: list[str]) -> Iterator[str]:
    """Yield each id once. `-` stands for the ids on stdin, one a line."""
    seen = set[str]()
    for id_ in chain.from_iterable(map(str.strip, sys.stdin) if id_ == "-" else (id_,) for id_ in ids):
        if id_ and id_ not in seen:
            seen.add(id_)
            yield id_
