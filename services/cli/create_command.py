"""`postroad create`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.errors import USAGE, Failure, explain, grpc_exit
from services.cli.filters import pairs
from services.cli.frame import API, Frame, command
from services.cli.output import Column
from services.cli.terminal import say
from services.cli.times import moment

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
# After these nothing of a batch was recorded; after other errors nobody knows.
_REFUSED = frozenset({"INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"})
_CREATED = (
    Column("id"),
    Column("status"),
    Column("email", least=12, rank=1),
    Column("subject", least=10, rank=2),
)


def _text(*names: str, text: str, metavar: str) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def register(app: typer.Typer) -> None:
    """Add `create` to the app."""

    @command(app, "create", uses=(API,), examples=EXAMPLES)
    def create(
        frame: Frame,
        *,
        email: Annotated[
            list[str] | None,
            typer.Argument(help="The recipients; each has a task of its own.", metavar="ADDRESS"),
        ] = None,
        subject: Annotated[str | None, _text("--subject", "-S", text="The subject.", metavar="TEXT")] = None,
        body: Annotated[
            str | None, _text("--body", "-b", text="The text part; - reads stdin.", metavar="TEXT")
        ] = None,
        body_file: Annotated[
            str, _text("--body-file", text="The text part, from a file.", metavar="FILE")
        ] = "",
        html_file: Annotated[
            str, _text("--html-file", text="The HTML part, from a file.", metavar="FILE")
        ] = "",
        label: Annotated[
            list[str] | None,
            _text("--label", "-l", text="A mark to list by; repeatable.", metavar="KEY=VALUE"),
        ] = None,
        header: Annotated[
            list[str] | None,
            _text("--header", "-H", text="A header field; repeatable.", metavar="NAME:VALUE"),
        ] = None,
        send_at: Annotated[str, _text("--send-at", text="Not before this time.", metavar="TIME")] = "",
        idempotency_key: Annotated[
            str,
            _text(
                "--idempotency-key",
                "-k",
                text="A repetition answers the first one's task. Of several recipients each has KEY:ADDRESS.",
                metavar="KEY",
            ),
        ] = "",
        batch: Annotated[
            str,
            _text("--batch", text="Mails from a file of JSON lines, - for stdin; see below.", metavar="FILE"),
        ] = "",
    ) -> None:
        """Record mails to send, and print their tasks.

        TIME is 2026-01-31T12:00:00Z, 2026-01-31 (UTC) or +10m. Of several mails each is recorded or refused
        by itself; the exit code is then the highest of theirs.
        """
        from services.cli import mail  # noqa: PLC0415

        flags = [email, subject, body, body_file, html_file, label, header, send_at, idempotency_key]
        if batch:
            if any(flag not in (None, "", []) for flag in flags):
                raise Failure("--batch takes its mails from the file alone", USAGE)
            with mail.opened(batch) as lines:
                _many(frame, mail.from_lines(lines, batch))
            return
        if not email or subject is None:
            raise Failure("a mail needs an ADDRESS and --subject (try 'postroad create --help')", USAGE)
        if body is not None and body_file:
            raise Failure("--body and --body-file are one and the same part", USAGE)
        if body == "-" or body_file:
            body = mail.text_of(body_file or "-", "--body-file")
        parts: dict[str, Any] = {"subject": subject, "labels": pairs(label, "--label")}
        parts |= {"headers": pairs(header, "--header", ":")}
        parts |= {"body": body} if body is not None else {}
        parts |= {"html": mail.text_of(html_file, "--html-file")} if html_file else {}
        time = moment(send_at, datetime.now(UTC)) if send_at else None
        requests = mail.from_flags(email, parts, idempotency_key, time)
        if len(email) == 1:
            _one(frame, next(requests))
        else:
            _many(frame, requests)


def _one(frame: Frame, request: pb.CreateRequest) -> None:
    import grpc  # noqa: PLC0415

    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.mail import named  # noqa: PLC0415
    from services.cli.tasks import task_row  # noqa: PLC0415

    with frame.channel() as channel:
        try:
            task = TaskServiceStub(channel).Create(request, timeout=DEADLINE)
        except grpc.RpcError as error:
            if (cause := explain(error)) is None:
                raise
            raise Failure(named(cause.line), cause.code) from None
    row = task_row(task)
    frame.out.one(row, lambda row: frame.out.table([row], _CREATED))


def _many(frame: Frame, requests: Iterable[pb.CreateRequest]) -> None:
    worst = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal worst
        for row in _recorded(frame, requests):
            if "error" in row:
                code = row["error"]["code"]
                say(f"postroad: {row['email']} (mail {row['number']}): {row['error']['message']}")
                worst = max(worst, grpc_exit(code))
            yield row

    shown = (row for row in rows() if not frame.out.is_table or "error" not in row)
    frame.out.rows(shown, _CREATED)
    if worst:
        raise typer.Exit(worst)


def _recorded(frame: Frame, requests: Iterable[pb.CreateRequest]) -> Iterator[dict[str, Any]]:
    import grpc  # noqa: PLC0415

    from postroad.v1 import task_service_pb2 as pb  # noqa: PLC0415
    from postroad.v1.task_service_pb2_grpc import TaskServiceStub  # noqa: PLC0415
    from services.cli.channel import DEADLINE  # noqa: PLC0415
    from services.cli.mail import chunks, named  # noqa: PLC0415
    from services.cli.tasks import task_row  # noqa: PLC0415

    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    number = 0
    with frame.channel() as channel:
        stub = TaskServiceStub(channel)
        batches = chunks(requests)
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
                if cause is None or error.code().name in _REFUSED:
                    raise
                where = f"mails {number + 1} to {number + len(chunk)} may or may not be recorded"
                raise Failure(f"{cause.line}; {where}", cause.code) from None
            for request, result in zip(chunk, answer.results, strict=True):
                number += 1
                if result.HasField("task"):
                    yield {"number": number} | task_row(result.task)
                    continue
                violations = [
                    {"field": named(v.field), "description": v.description} for v in result.error.violations
                ]
                refusal = {
                    "code": codes.get(result.error.code, "UNKNOWN"),
                    "message": named(result.error.message),
                    "reason": result.error.reason,
                    "metadata": dict(result.error.metadata),
                    "violations": violations,
                }
                yield {"number": number, "email": request.data.email, "error": refusal}
