"""`postroad create`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.command import API, CommandContext, command
from services.cli.errors import USAGE, Failure, explain, grpc_exit
from services.cli.filters import parse_pairs
from services.cli.output import Column
from services.cli.terminal import say
from services.cli.times import parse_time

if TYPE_CHECKING:
    from postroad.v1 import task_service_pb2 as pb

__all__ = ["register"]

EXAMPLES = r"""
postroad create ada@example.org --subject Hello --body "It works."
postroad create ada@example.org bob@example.org -S News \
    --html-file news.html --label list=news
date | postroad create ops@example.org -S "The time" -b - --send-at +10m
postroad create --batch mails.jsonl -o jsonl

A line of mails.jsonl; email, subject, and body or html must be there:
{"email": "ada@example.org", "subject": "Hello", "body": "It works.",
 "html": "<p>It works.", "labels": {"list": "news"},
 "headers": {"Reply-To": "news@example.org"},
 "idempotency_key": "news-7-ada", "send_at": "2026-01-31T12:00:00Z"}
"""
# After these codes, nothing of a batch was recorded. After others, nobody knows.
_NOTHING_RECORDED = frozenset({"INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"})
_CREATED = (
    Column("id"),
    Column("status"),
    Column("email", min_width=12, rank=1),
    Column("subject", min_width=10, rank=2),
)


def _text_option(*names: str, text: str, metavar: str) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def register(app: typer.Typer) -> None:
    """Add `create` to the app."""

    @command(app, "create", uses=(API,), examples=EXAMPLES)
    def create(
        context: CommandContext,
        *,
        email: Annotated[
            list[str] | None,
            typer.Argument(help="The recipients; each has a task of its own.", metavar="ADDRESS"),
        ] = None,
        subject: Annotated[
            str | None, _text_option("--subject", "-S", text="The subject.", metavar="TEXT")
        ] = None,
        body: Annotated[
            str | None, _text_option("--body", "-b", text="The text part; - reads stdin.", metavar="TEXT")
        ] = None,
        body_file: Annotated[
            str, _text_option("--body-file", text="The text part, from a file.", metavar="FILE")
        ] = "",
        html_file: Annotated[
            str, _text_option("--html-file", text="The HTML part, from a file.", metavar="FILE")
        ] = "",
        label: Annotated[
            list[str] | None,
            _text_option("--label", "-l", text="A label to list by; repeatable.", metavar="KEY=VALUE"),
        ] = None,
        header: Annotated[
            list[str] | None,
            _text_option("--header", "-H", text="A header field; repeatable.", metavar="NAME:VALUE"),
        ] = None,
        send_at: Annotated[str, _text_option("--send-at", text="Not before this time.", metavar="TIME")] = "",
        idempotency_key: Annotated[
            str,
            _text_option(
                "--idempotency-key",
                "-k",
                text="A repetition answers the first one's task. Of several recipients each has KEY:ADDRESS.",
                metavar="KEY",
            ),
        ] = "",
        batch: Annotated[
            str,
            _text_option(
                "--batch", text="Mails from a file of JSON lines, - for stdin; see above.", metavar="FILE"
            ),
        ] = "",
    ) -> None:
        """Record mails to send, and print their tasks.

        TIME is 2026-01-31T12:00:00Z, 2026-01-31 (UTC) or +10m. Of several mails each is recorded or refused
        by itself; the exit code is then the highest of theirs.
        """
        from services.cli import create_requests  # noqa: PLC0415

        flags = [email, subject, body, body_file, html_file, label, header, send_at, idempotency_key]
        if batch:
            if any(flag not in (None, "", []) for flag in flags):
                raise Failure("--batch takes its mails from the file alone", USAGE)
            with create_requests.open_batch(batch) as lines:
                _create_many(context, create_requests.requests_from_lines(lines, batch))
            return
        if not email or subject is None:
            raise Failure("a mail needs an ADDRESS and --subject (try 'postroad create --help')", USAGE)
        if body is not None and body_file:
            raise Failure("--body and --body-file are one and the same part", USAGE)
        if body == "-" or body_file:
            body = create_requests.read_text(body_file or "-", "--body-file")
        parts: dict[str, Any] = {"subject": subject, "labels": parse_pairs(label, "--label")}
        parts |= {"headers": parse_pairs(header, "--header", ":")}
        parts |= {"body": body} if body is not None else {}
        parts |= {"html": create_requests.read_text(html_file, "--html-file")} if html_file else {}
        time = parse_time(send_at, datetime.now(UTC)) if send_at else None
        requests = create_requests.requests_from_flags(email, parts, idempotency_key, time)
        if len(email) == 1:
            _create_one(context, next(requests))
        else:
            _create_many(context, requests)


def _create_one(context: CommandContext, request: pb.CreateRequest) -> None:
    import grpc  # noqa: PLC0415

    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.create_requests import without_data  # noqa: PLC0415
    from services.cli.tasks import task_row  # noqa: PLC0415

    with context.channel() as channel:
        try:
            task = TaskServiceStub(channel).Create(request, timeout=DEADLINE)
        except grpc.RpcError as error:
            if (cause := explain(error)) is None:
                raise
            raise Failure(without_data(cause.line), cause.code) from None
    row = task_row(task)
    context.out.one(row, lambda row: context.out.table([row], _CREATED))


def _create_many(context: CommandContext, requests: Iterable[pb.CreateRequest]) -> None:
    worst = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal worst
        for row in _create_in_batches(context, requests):
            if "error" in row:
                code = row["error"]["code"]
                say(f"postroad: {row['email']} (mail {row['number']}): {row['error']['message']}")
                worst = max(worst, grpc_exit(code))
            yield row

    shown = (row for row in rows() if not context.out.is_table or "error" not in row)
    context.out.rows(shown, _CREATED)
    if worst:
        raise typer.Exit(worst)


def _create_in_batches(
    context: CommandContext, requests: Iterable[pb.CreateRequest]
) -> Iterator[dict[str, Any]]:
    import grpc  # noqa: PLC0415

    from postroad.v1 import task_service_pb2 as pb  # noqa: PLC0415
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.create_requests import batch_chunks, without_data  # noqa: PLC0415
    from services.cli.tasks import task_row  # noqa: PLC0415

    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    number = 0
    with context.channel() as channel:
        stub = TaskServiceStub(channel)
        batches = batch_chunks(requests)
        while True:
            try:
                chunk = next(batches, None)
            except Failure as error:
                raise Failure(f"{error.line}; {number} mails before it are done", error.code) from None
            if chunk is None:
                return
            try:
                answer = stub.BatchCreate(pb.BatchCreateRequest(requests=chunk), timeout=3 * DEADLINE)
            except grpc.RpcError as error:
                cause = explain(error)
                if cause is None or error.code().name in _NOTHING_RECORDED:
                    raise
                where = f"mails {number + 1} to {number + len(chunk)} may or may not be recorded"
                raise Failure(f"{cause.line}; {where}", cause.code) from None
            for request, result in zip(chunk, answer.results, strict=True):
                number += 1
                if result.HasField("task"):
                    yield {"number": number} | task_row(result.task)
                    continue
                violations = [
                    {"field": without_data(v.field), "description": v.description}
                    for v in result.error.violations
                ]
                refusal = {
                    "code": codes.get(result.error.code, "UNKNOWN"),
                    "message": without_data(result.error.message),
                    "reason": result.error.reason,
                    "metadata": dict(result.error.metadata),
                    "violations": violations,
                }
                yield {"number": number, "email": request.data.email, "error": refusal}
