"""The requests that `create`, `cancel` and the filters make."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace

import grpc
import pytest
import typer
from grpc_status import rpc_status

from postroad.v1 import task_pb2, task_service_pb2
from services.api.errors import StatusError, being_sent, database_unavailable, draining, overloaded
from services.cli import change_commands
from services.cli.command import CommandContext
from services.cli.create_requests import batch_chunks, requests_from_flags, requests_from_lines, without_data
from services.cli.errors import UNAVAILABLE, USAGE, Failure, explain
from services.cli.filters import filter_fields, parse_pairs
from services.cli.times import parse_time

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("now", NOW),
        ("-2h", datetime(2026, 1, 31, 10, tzinfo=UTC)),
        ("+10m", datetime(2026, 1, 31, 12, 10, tzinfo=UTC)),
        ("-1.5d", datetime(2026, 1, 30, 0, tzinfo=UTC)),
        ("2026-01-30", datetime(2026, 1, 30, tzinfo=UTC)),
        ("2026-01-30T10:00", datetime(2026, 1, 30, 10, tzinfo=UTC)),
        ("2026-01-30T10:00:00Z", datetime(2026, 1, 30, 10, tzinfo=UTC)),
        ("2026-01-30T10:00:00+02:00", datetime(2026, 1, 30, 8, tzinfo=UTC)),
    ],
)
def test_times_are_parsed(text: str, means: datetime) -> None:
    assert parse_time(text, NOW) == means


@pytest.mark.parametrize("text", ["", "soon", "2h", "+2y", "2026-13-01", "+999999999w", "12345"])
def test_a_text_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(Failure, match="no time") as failed:
        parse_time(text, NOW)
    assert failed.value.code == USAGE


def test_pairs_keep_their_values_whole() -> None:
    assert parse_pairs(["a=1=2", "b="], "--label") == {"a": "1=2", "b": ""}
    assert parse_pairs(["Reply-To: a@b.example"], "--header", ":") == {"Reply-To": "a@b.example"}
    for bad in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(Failure, match="--label"):
            parse_pairs(bad, "--label")


def test_filters_are_the_apis_fields() -> None:
    assert filter_fields(["failed", "failed"], "", "x.example", "", ["a=1"]) == {
        "status": ["failed"],
        "email": "",
        "domain": "x.example",
        "reason": "",
        "labels": {"a": "1"},
    }


def test_each_of_several_recipients_has_a_key_of_its_own() -> None:
    one = list(requests_from_flags(["a@x.example"], {"subject": "s", "body": ""}, "k", NOW))
    assert [(r.data.email, r.idempotency_key, r.data.HasField("body")) for r in one] == [
        ("a@x.example", "k", True)
    ]
    assert one[0].send_at.ToDatetime(UTC) == NOW
    two = list(requests_from_flags(["a@x.example", "b@x.example"], {"subject": "s"}, "k", None))
    assert [r.idempotency_key for r in two] == ["k:a@x.example", "k:b@x.example"]
    assert not two[0].HasField("send_at")


def test_lines_are_flat_or_whole_requests() -> None:
    flat = (
        '{"email": "a@x.example", "subject": "s", "body": "b", "labels": {"k": "v"}, "idempotency_key": "1"}'
    )
    whole = (
        '{"data": {"email": "a@x.example", "subject": "s", "body": "b", "labels": {"k": "v"}},'
        '"idempotencyKey": "1"}'
    )
    first, second = requests_from_lines([flat.encode(), b"\n", whole.encode()], "x")
    assert first == second
    assert first.data.body == "b"


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"emial": "a"}', '{"email": 3}', '{"send_at": "soon"}', '{"data": 3}']
)
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(Failure, match="mails, line 2") as failed:
        list(requests_from_lines([b"{}", line.encode()], "mails"))
    assert failed.value.code == USAGE


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"emial": "a"}',
            "no field 'emial'; the fields are email, subject, body, html, headers, labels, idem",
        ),
        ('{"email": 3}', "email must be a text"),
        ('{"email": "a", "labels": {"a": 1}}', "labels must be an object of texts"),
        ('{"email": "a", "headers": "x"}', "headers must be an object of texts"),
        ('{"email": "a", "send_at": "soon"}', "send_at must be a time (RFC 3339)"),
        ('{"data": {"emial": "a"}}', "no field 'emial'"),
        ('{"data": 3}', "data is no object"),
        ("[]", "no JSON object"),
        ("{", "no JSON object"),
    ],
)
def test_an_error_in_a_line_uses_the_file_s_names(line: str, says: str) -> None:
    with pytest.raises(Failure) as failed:
        list(requests_from_lines([line.encode()], "mails"))
    assert says in failed.value.line
    assert not any(word in failed.value.line for word in ("postroad.v1", "TaskData", "CreateRequest"))


def test_the_api_s_errors_use_the_file_s_names() -> None:
    printed = "data.email: has no domain; data.headers[X-Data.email]: is too long; and 2 more"
    assert without_data(printed) == "email: has no domain; headers[X-Data.email]: is too long; and 2 more"
    assert without_data("send_at: is more than a year from now") == "send_at: is more than a year from now"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("completed", "not cancelled: its mail went out"),
        ("failed", "not cancelled: it had failed"),
        ("uncertain", "not cancelled: its mail may have gone out"),
        ("cancelled", ""),
    ],
)
def test_cancel_says_why_a_task_is_not_cancelled(
    status: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_pb2.Task(id="1", status=status)
    stub = SimpleNamespace(Cancel=lambda request, timeout: task)
    monkeypatch.setattr("postroad.v1.task_service_pb2_grpc.TaskServiceStub", lambda channel: stub)
    monkeypatch.setattr(CommandContext, "channel", lambda self: nullcontext())
    app = typer.Typer()
    change_commands.register(app)
    with pytest.raises(SystemExit) as ended:
        app(["cancel", "1"])
    assert ended.value.code == (1 if says else 0)
    printed = capsys.readouterr().err
    assert printed == (f"postroad: 1: {says}\n" if says else "")


class Answered(grpc.RpcError):
    """A failed call, with the api's details or without any."""

    def __init__(self, problem: StatusError, own: bool = True) -> None:
        super().__init__()
        self._problem = problem
        self._trailers = rpc_status.to_status(problem.status()).trailing_metadata if own else ()

    def code(self) -> grpc.StatusCode:
        return self._problem.code

    def details(self) -> str:
        return self._problem.message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._trailers


def cancelling(monkeypatch: pytest.MonkeyPatch, first: grpc.RpcError) -> tuple[list[str], typer.Typer]:
    """Return the ids of the calls, and an app whose api answers the first call with `first`."""
    asked: list[str] = []

    def cancel(request: task_service_pb2.CancelRequest, timeout: float) -> task_pb2.Task:
        asked.append(request.id)
        if len(asked) == 1:
            raise first
        return task_pb2.Task(id=request.id, status="cancelled")

    stub = SimpleNamespace(Cancel=cancel)
    monkeypatch.setattr("postroad.v1.task_service_pb2_grpc.TaskServiceStub", lambda channel: stub)
    monkeypatch.setattr(CommandContext, "channel", lambda self: nullcontext())
    app = typer.Typer()
    change_commands.register(app)
    return asked, app


def test_a_task_that_is_being_sent_does_not_end_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, app = cancelling(monkeypatch, Answered(being_sent("1")))
    with pytest.raises(SystemExit) as ended:
        app(["cancel", "1", "2", "3"])
    assert (asked, ended.value.code) == (["1", "2", "3"], 1)
    shown = capsys.readouterr()
    assert shown.err == "postroad: 1: task 1 is being sent; nothing was cancelled\n"
    assert shown.out.count("cancelled") == 2


@pytest.mark.parametrize(
    "answer",
    [
        Answered(database_unavailable()),
        Answered(draining()),
        Answered(overloaded()),
        Answered(StatusError(grpc.StatusCode.UNAVAILABLE, "failed to connect"), own=False),
    ],
    ids=["database", "draining", "overloaded", "connection"],
)
def test_an_unreachable_api_ends_the_command(monkeypatch: pytest.MonkeyPatch, answer: grpc.RpcError) -> None:
    asked, app = cancelling(monkeypatch, answer)
    with pytest.raises(grpc.RpcError) as ended:
        app(["cancel", "1", "2"])
    cause = explain(ended.value)
    assert asked == ["1"]
    assert cause is not None
    assert cause.code == UNAVAILABLE


def test_a_batch_has_at_most_1000_requests_and_16_mib() -> None:
    small = requests_from_flags([f"{n}@x.example" for n in range(2001)], {"subject": "s"}, "", None)
    assert [len(chunk) for chunk in batch_chunks(small)] == [1000, 1000, 1]
    large = requests_from_flags(
        [f"{n}@x.example" for n in range(20)], {"subject": "s", "body": "x" * (1 << 20)}, "", None
    )
    assert [len(chunk) for chunk in batch_chunks(large)] == [15, 5]
    assert list(batch_chunks([])) == []
