"""Every command with nothing to show: an api without tasks, a cluster without records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from postroad.v1.task_service_pb2_grpc import TaskServiceServicer, add_TaskServiceServicer_to_server
from services.cli.output import OutputFormat
from tests.cli import Command, Done
from tests.forms import by_form
from tests.stack import Infra

FORMS = by_form((OutputFormat.TABLE, OutputFormat.JSON), tuple(OutputFormat))
ID = "019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071"


class Empty(TaskServiceServicer):
    """An api that knows one task without a folded event, and lists none."""

    def Get(self, request: pb.GetRequest, context: Any) -> task_pb2.Task:
        return task_pb2.Task(id=request.id, email="ada@good.test", status="pending")

    def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        return pb.ListResponse()

    def Count(self, request: pb.CountRequest, context: Any) -> pb.CountResponse:
        return pb.CountResponse()

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.WatchResponse]:
        task = task_pb2.Task(id=request.id, email="ada@good.test", status="completed")
        yield pb.WatchResponse(task=task)


@pytest.fixture(scope="module")
def api() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    add_TaskServiceServicer_to_server(Empty(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def postroad(api: str, infra: Infra) -> Command:
    """The command of an installation with empty topics and tables."""
    command = Command(
        {
            "POSTROAD_API": api,
            "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
            "POSTROAD_DATABASE_URL": infra.migrated_database(),
            "POSTROAD_TOPIC_PREFIX": infra.topic_prefix(),
            "POSTROAD_PARTITIONS": "1",
            "POSTROAD_VALIDATOR_DELAYS": "7",
            "POSTROAD_SENDER_DELAYS": "9",
        }
    )
    assert command("topics", "apply", "--yes").code == 0
    return command


def ended(done: Done, form: OutputFormat) -> Done:
    """Check that the command succeeded, and that its result has this format."""
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    if form is OutputFormat.JSON:
        json.loads(done.out)
    elif form is OutputFormat.JSONL:
        [json.loads(line) for line in done.out.splitlines()]
    return done


@pytest.mark.parametrize("form", OutputFormat)
def test_a_task_without_a_folded_event_is_shown(postroad: Command, form: OutputFormat) -> None:
    done = ended(postroad("get", ID, "-o", form), form)
    assert ID in done.out
    if form is OutputFormat.TABLE:
        assert "STAGE" not in done.out
        assert done.err == "No event of it is folded yet: see 'postroad lag --stage status'.\n"


COMMANDS = {
    "list": "No such task.",
    "list --status failed --all": "No such task.",
    "list --count": "",
    f"watch {ID}": "",
    "dead list": "There are no dead letters.",
    "dead list --each": "There are no dead letters.",
    "dead list --stage sender --cause KeyError": "There are no dead letters.",
    "replay task.created --dry-run": "There are no records.",
    "replay mx.ok --yes": "There are no records.",
    "lag --interval 0": "",
    "lag --interval 0 --partitions --stage sender": "",
    "lag --interval 0 --domains --stage sender": "",
    "topics apply": "",
    "topics check": "",
    "migrate": "",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arguments", COMMANDS)
def test_an_empty_result_is_said(postroad: Command, arguments: str, form: OutputFormat) -> None:
    done = ended(postroad(*arguments.split(), "-o", form), form)
    if form is OutputFormat.TABLE and (printed := COMMANDS[arguments]):
        assert printed in done.err


@pytest.mark.parametrize(
    ("arguments", "form"), [("rebuild", OutputFormat.JSON), ("rebuild --yes", OutputFormat.TABLE)]
)
def test_empty_tables_equal_empty_topics(postroad: Command, arguments: str, form: OutputFormat) -> None:
    done = ended(postroad(*arguments.split(), "-o", form), form)
    assert done.err == ""


@pytest.mark.parametrize("arguments", ["dead replay --all --yes", "dead purge --all --yes"])
def test_absent_dead_letters_are_not_found(postroad: Command, arguments: str) -> None:
    done = postroad(*arguments.split())
    assert (done.code, done.out) == (3, "")
    assert done.err == "postroad: there are no such dead letters\n"


@pytest.mark.parametrize("form", OutputFormat)
def test_an_empty_batch_creates_nothing(postroad: Command, form: OutputFormat) -> None:
    done = postroad("create", "--batch", "-", "-o", form, given="")
    assert "Traceback" not in done.err
    assert done.code in (0, 2)
