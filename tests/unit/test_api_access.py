"""The api's server in front of its tokens and certificates, over real connections."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from postroad.v1 import task_service_pb2 as pb
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import access
from services.api.failed_attempts import BURST
from services.api.scopes import SCOPES_OF
from services.common.grants import SCOPES
from tests.access_server import Code, bearer, call, grant_line, serve, until, write_tokens

RPCS = [method.name for method in pb.DESCRIPTOR.services_by_name["TaskService"].methods]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files more often than an api does."""
    monkeypatch.setattr(access, "_INTERVAL", 0.1)


def test_every_rpc_needs_a_scope() -> None:
    assert set(SCOPES_OF) == set(RPCS)


async def test_each_scope_allows_its_rpcs_and_no_other(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens", *(grant_line(scope, scopes=scope) for scope in SCOPES))
    async with serve(tokens_file=path) as served, grpc.aio.insecure_channel(served.target) as channel:
        for rpc in RPCS:
            for scope in SCOPES:
                expected = (
                    (Code.OK, "") if scope in SCOPES_OF[rpc] else (Code.PERMISSION_DENIED, "SCOPE_MISSING")
                )
                assert await call(channel, rpc, bearer(scope)) == expected, (rpc, scope)
            assert await call(channel, rpc) == (Code.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_an_operator_names_a_tenant_and_nobody_else_does(tmp_path: Path) -> None:
    path = write_tokens(
        tmp_path / "tokens", grant_line("ops", "ops"), grant_line("shop", scopes="create,read,cancel,content")
    )
    async with serve(tokens_file=path) as served, grpc.aio.insecure_channel(served.target) as channel:
        assert await call(channel, "List", bearer("ops", postroad_tenant="bank")) == (Code.OK, "")
        assert (served.calls[-1].tenant, served.calls[-1].grant.tenant) == ("bank", "ops")
        assert await call(channel, "List", bearer("shop", postroad_tenant="shop")) == (Code.OK, "")
        assert await call(channel, "List", bearer("shop", postroad_tenant="bank")) == (
            Code.PERMISSION_DENIED,
            "SCOPE_MISSING",
        )
        for rpc, tenant in (("Create", "bank"), ("BatchCreate", "bank"), ("List", "../x"), ("List", "")):
            found = await call(channel, rpc, bearer("ops", postroad_tenant=tenant))
            assert found == (Code.INVALID_ARGUMENT, "INVALID_REQUEST"), rpc
        twice = [*bearer("ops", postroad_tenant="a"), ("postroad-tenant", "b")]
        assert (await call(channel, "List", twice))[0] is Code.INVALID_ARGUMENT


async def test_a_revoked_or_ended_token_ends_its_open_watch_within_5_s(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    lines = {
        "revoked": grant_line("revoked"),
        "ended": grant_line("ended", seconds=2),
        "stays": grant_line("stays"),
    }
    write_tokens(path, *lines.values())
    async with serve(tokens_file=str(path)) as served, grpc.aio.insecure_channel(served.target) as channel:
        stub: Any = TaskServiceStub(channel)  # type: ignore[arg-type]
        streams = {id_: stub.Watch(pb.WatchRequest(), metadata=bearer(id_)) for id_ in lines}
        for stream in streams.values():
            await stream.read()
        begin = time.monotonic()
        write_tokens(path, lines["ended"], lines["stays"])
        for id_ in ("ended", "revoked"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(streams[id_].read(), 30)
            assert caught.value.code() is Code.UNAUTHENTICATED
            assert time.monotonic() - begin < 5
            assert (await call(channel, "Count", bearer(id_)))[0] is Code.UNAUTHENTICATED
        assert await call(channel, "Count", bearer("stays")) == (Code.OK, "")
        assert not streams["stays"].done()
        # The last token too can be revoked.
        write_tokens(path)
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(streams["stays"].read(), 30)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("rpc", ["BatchCreate", "Watch"])
async def test_a_call_whose_token_is_revoked_before_its_request_has_come_is_refused(
    tmp_path: Path, rpc: str
) -> None:
    path = tmp_path / "tokens"
    write_tokens(path, grant_line("revoked"), grant_line("stays"))
    async with serve(tokens_file=str(path)) as served, grpc.aio.insecure_channel(served.target) as channel:
        # A client may take a minute for its request.
        slow = {
            id_: channel.stream_stream(f"/postroad.v1.TaskService/{rpc}")(metadata=bearer(id_))
            for id_ in ("revoked", "stays")
        }
        await asyncio.sleep(0.3)
        write_tokens(path, grant_line("stays"))
        await until(lambda: _is_refused(channel, "revoked"))
        served.calls.clear()
        for stream in slow.values():
            await stream.write(b"")
        assert await asyncio.wait_for(slow["stays"].read(), 30) == b""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(slow["revoked"].read(), 30)
        assert caught.value.code() is Code.UNAUTHENTICATED
        assert [answered.grant.id for answered in served.calls] == ["stays"]
        slow["stays"].cancel()


async def _is_refused(channel: grpc.aio.Channel, id_: str) -> bool:
    return (await call(channel, "Count", bearer(id_)))[0] is Code.UNAUTHENTICATED


@pytest.mark.usefixtures("hurried")
async def test_a_malformed_change_leaves_the_old_list_and_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    write_tokens(path, grant_line("old"))
    async with serve(tokens_file=str(path)) as served, grpc.aio.insecure_channel(served.target) as channel:
        for spoil in (lambda: write_tokens(path, "s3cret"), path.unlink):
            spoil()
            [problem] = await until(served.access.problems)
            assert str(path) in problem
            assert "s3cret" not in problem
            assert await call(channel, "Count", bearer("old")) == (Code.OK, "")
        write_tokens(path, grant_line("new"))
        await until(lambda: not served.access.problems())
        assert await call(channel, "Count", bearer("new")) == (Code.OK, "")
        assert (await call(channel, "Count", bearer("old")))[0] is Code.UNAUTHENTICATED


def denied() -> dict[str, float]:
    """Return how many calls were denied so far, by reason."""
    [family] = [found for found in REGISTRY.collect() if found.name == "postroad_api_denied"]
    return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}


async def test_denied_calls_are_counted_by_reason(tmp_path: Path) -> None:
    path = write_tokens(
        tmp_path / "tokens", grant_line("known", scopes="read"), grant_line("over", seconds=-1)
    )
    before = denied()
    async with serve(tokens_file=path) as served, grpc.aio.insecure_channel(served.target) as channel:
        for metadata in (None, bearer("known"), bearer("unknown"), bearer("over")):
            await call(channel, "Create", metadata)
    reasons = ("TOKEN_MISSING", "SCOPE_MISSING", "TOKEN_UNKNOWN", "TOKEN_ENDED")
    assert {reason: denied()[reason] - before.get(reason, 0) for reason in reasons} == dict.fromkeys(
        reasons, 1
    )
    # No other label, such as one with a token.
    assert denied().keys() <= {*reasons, "SLOWED_DOWN", "TENANT_MISSING"}


async def test_a_peer_that_fails_too_often_is_told_to_wait(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens", grant_line("known"))
    async with serve(tokens_file=path) as served, grpc.aio.insecure_channel(served.target) as channel:
        found = [(await call(channel, "Count"))[0] for _ in range(2 * BURST)]
        assert found[:BURST] == [Code.UNAUTHENTICATED] * BURST
        assert found[-1] is Code.RESOURCE_EXHAUSTED
        assert await call(channel, "Count", bearer("known")) == (Code.OK, "")
