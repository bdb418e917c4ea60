"""What operators reach and see of other tenants' tasks, on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from postroad.v1 import task_service_pb2 as pb
from postroad.v1.task_pb2 import Task
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.common.operations.tokens import add_token, revoke_token
from tests.api_process import ApiProcess, Installation, eventually, request
from tests.stack import Infra

Code = grpc.StatusCode


class Field:
    """An api with the tokens of a tenant, of an operator, and of one who sees content."""

    def __init__(self, infra: Infra, directory: Path) -> None:
        self.path = directory / "tokens"
        self.ids: dict[str, str] = {}
        self.metadata: dict[str, list[tuple[str, str]]] = {}
        for name, tenant, scopes in (
            ("shop", "shop", "create,read,cancel"),
            ("operator", "ops", "read,cancel,operate"),
            ("auditor", "ops", "read,operate,content"),
        ):
            grant, token = add_token(self.path, tenant, scopes, None)
            self.ids[name] = grant.id
            self.metadata[name] = [("authorization", f"Bearer {token}")]
        self.installation = Installation(infra)
        self.api = ApiProcess(self.installation, POSTROAD_TOKENS_FILE=str(self.path))

    def call(self, who: str, rpc: str, tenant: str = "", **fields: Any) -> Any:
        """Call an RPC with a name's token, as an operator of `tenant` if that is given."""
        metadata = [*self.metadata[who], *([("postroad-tenant", tenant)] if tenant else [])]
        with grpc.insecure_channel(self.api.target) as channel:
            method: Any = getattr(TaskServiceStub(channel), rpc)
            return method(getattr(pb, f"{rpc}Request")(**fields), metadata=metadata, timeout=20)

    def refusal(self, *arguments: str, **fields: Any) -> Code:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(*arguments, **fields)
        found: Code = caught.value.code()
        return found

    def created(self, number: int) -> Task:
        with grpc.insecure_channel(self.api.target) as channel:
            stub = TaskServiceStub(channel)
            return stub.Create(request(number), metadata=self.metadata["shop"], timeout=20)


@pytest.fixture(scope="module")
def field(infra: Infra, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    field = Field(infra, tmp_path_factory.mktemp("operators"))
    with field.api:
        yield field


def is_masked(task: Task) -> bool:
    return (task.email, task.subject) == ("***@shop.test", "***") and task.body in ("", "***")


def test_an_operator_reaches_a_task_by_its_id_and_sees_no_content(field: Field) -> None:
    task = field.created(1)
    own, masked, full = (field.call(who, "Get", id=task.id) for who in ("shop", "operator", "auditor"))
    assert own == full
    assert (own.email, own.body) == ("u1@shop.test", "text")
    assert is_masked(masked)
    assert (masked.id, masked.body, masked.status) == (task.id, "***", "pending")
    assert is_masked(field.call("operator", "Get", "shop", id=task.id))
    assert field.refusal("operator", "Get", "ops", id=task.id) is Code.NOT_FOUND


def test_an_operator_lists_one_tenant_and_cannot_ask_for_an_address(field: Field) -> None:
    task = field.created(2)
    assert field.call("operator", "Count").total == 0
    assert field.call("operator", "Count", "shop").total > 0
    listed = field.call("operator", "List", "shop").results
    assert task.id in [found.id for found in listed]
    assert all(map(is_masked, listed))
    assert not any(map(is_masked, field.call("auditor", "List", "shop").results))
    assert field.call("operator", "List", "shop", domain="shop.test").results
    for rpc in ("List", "Count"):
        assert field.refusal("operator", rpc, "shop", email=task.email) is Code.PERMISSION_DENIED
    assert field.call("auditor", "Count", "shop", email=task.email).total == 1


def test_an_operator_and_its_tenant_cancel_and_retry_a_task(field: Field) -> None:
    task = field.created(3)
    cancelled = field.call("operator", "Cancel", id=task.id)
    retried = field.call("operator", "Retry", id=task.id)
    assert (cancelled.status, retried.status) == ("cancelled", "pending")
    assert is_masked(cancelled)
    assert is_masked(retried)
    assert field.call("shop", "Cancel", id=task.id).status == "cancelled"
    assert field.call("shop", "Retry", id=task.id).status == "pending"
    assert field.refusal("shop", "Resolve", id=task.id, resolution=1) is Code.FAILED_PRECONDITION
    assert field.refusal("auditor", "Resolve", id=task.id, resolution=1) is Code.FAILED_PRECONDITION


def test_an_operator_watches_a_tenants_task_masked(field: Field) -> None:
    task = field.created(4)
    for who, masked in (("operator", True), ("auditor", False), ("shop", False)):
        with grpc.insecure_channel(field.api.target) as channel:
            stream = TaskServiceStub(channel).Watch(
                pb.WatchRequest(id=task.id), metadata=field.metadata[who], timeout=20
            )
            first = next(stream)
            assert first.task.id == task.id
            assert is_masked(first.task) is masked
            stream.cancel()


def test_a_revoked_token_ends_its_watch_and_the_file_is_a_problem_while_it_is_malformed(field: Field) -> None:
    grant, token = add_token(field.path, "shop", "read", None)
    metadata = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(field.api.target) as channel:
        stub = TaskServiceStub(channel)

        def is_known() -> bool:
            try:
                stub.Count(pb.CountRequest(), metadata=metadata, timeout=20)
            except grpc.RpcError:
                return False
            return True

        eventually(is_known, 5)
        stream = stub.Watch(pb.WatchRequest(), metadata=metadata, timeout=30)
        next(stream)
        revoke_token(field.path, grant.id)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is Code.UNAUTHENTICATED
    good = field.path.read_text()
    field.path.write_text(f"{good}s3cret\n")
    eventually(lambda: any("line" in problem for problem in field.api.readiness().get("problems", ())), 5)
    assert field.api.readiness()["status"] == "degraded"
    assert field.call("shop", "Count")
    field.path.write_text(good)
    eventually(lambda: not any("line" in p for p in field.api.readiness().get("problems", ())), 5)
    assert "s3cret" not in field.api.log()
    assert token not in field.api.log()


def test_an_api_without_a_good_tokens_file_does_not_start(field: Field, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("s3cret\n")
    broken = ApiProcess(field.installation, POSTROAD_TOKENS_FILE=str(path))
    broken.start()
    assert broken.process is not None
    assert broken.process.wait(30) == 2
    assert "POSTROAD_TOKENS_FILE" in broken.log()
    assert "s3cret" not in broken.log()
