"""The metadata of a call, its bearer token, and a long batch."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from postroad.v1.task_service_pb2 import BatchCreateRequest, CreateRequest, TaskData
from services.api import errors, turns
from services.api.auth import Tenants
from services.api.call import Call, Metadata, set_call
from services.api.task_service import TaskServicer


def test_a_metadata_key_with_two_values_has_none() -> None:
    metadata = Metadata([("a", "1"), ("b", "1"), ("b", "2"), ("c", "3"), ("c", "3")])
    assert metadata == {"a": "1", "c": "3"}
    assert metadata.repeated == {"b"}


def test_two_bearer_tokens_are_refused() -> None:
    metadata = Metadata([("authorization", "Bearer s3cret-one"), ("authorization", "Bearer s3cret-two")])
    with pytest.raises(errors.StatusError) as caught:
        Tenants("shop:s3cret-one,bank:s3cret-two").tenant(metadata)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_an_empty_list_of_tokens_opens_nothing() -> None:
    with pytest.raises(ValueError, match="has no pair"):
        Tenants("")


def test_without_tokens_everyone_is_the_default_tenant() -> None:
    assert Tenants(None).tenant({"authorization": "Bearer whatever"}) == "default"


def test_a_token_identifies_its_tenant() -> None:
    tenants = Tenants("shop:s3cret-one, shop:s3cret-two,bank:x:y:z:12345")
    assert tenants.tenant({"authorization": "Bearer s3cret-one"}) == "shop"
    assert tenants.tenant({"authorization": "bearer  s3cret-two"}) == "shop"
    assert tenants.tenant({"authorization": "Bearer x:y:z:12345"}) == "bank"
    for bad in ("", "Bearer", "Bearer ", "Bearer s3cret-onE", "Basic s3cret-one", "s3cret-one"):
        with pytest.raises(errors.StatusError) as caught:
            tenants.tenant({"authorization": bad})
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(errors.StatusError):
        tenants.tenant({})


@pytest.mark.parametrize(
    "tokens",
    ["shop", "shop:", ":s3cret-one", "sh op:s3cret-one", "a:s3cret-one,b:s3cret-one", "shop:short", ",", " "],
)
def test_invalid_token_settings_are_refused_without_showing_a_token(tokens: str) -> None:
    with pytest.raises(ValueError, match="pair") as caught:
        Tenants(tokens)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("shop", "TENANT:TOKEN"),
        (",", "TENANT:TOKEN"),
        ("-shop:s3cret-one", "tenant of pair 1"),
        ("shop:s3cret-one,bank:short", "token of pair 2 is not 8 or more visible ASCII characters"),
        ("shop:s3crét-one", "visible ASCII"),
        ("shop:s3cret\t-one", "visible ASCII"),
    ],
)
def test_the_error_of_a_token_setting_says_what_is_wrong(tokens: str, says: str) -> None:
    with pytest.raises(ValueError, match="pair") as caught:
        Tenants(tokens)
    assert says in str(caught.value)


async def test_a_long_batch_does_not_block_the_event_loop() -> None:
    async def record_batch(items: list[object]) -> list[None]:
        return [None] * len(items)

    recorder: Any = SimpleNamespace(record_batch=record_batch)
    unused: Any = None
    service = TaskServicer(recorder, unused, unused, unused, max_body=1000, keys=unused)
    set_call(Call("default", Metadata(()), 0))
    # Each takes some milliseconds to parse.
    senders = [", ".join(f"Ann <a{number}.{n}@example.org>" for n in range(20)) for number in range(30)]
    data = [TaskData(email="a@b.test", subject="s", body="", headers={"Reply-To": many}) for many in senders]
    request = BatchCreateRequest(requests=[CreateRequest(data=one) for one in data])
    batch = asyncio.create_task(service.BatchCreate(request, unused))
    taken = 0
    while not batch.done():
        taken += 1
        await asyncio.sleep(0)
    assert len(batch.result().results) == len(data)
    assert taken >= 5


async def test_items_give_others_their_turn_after_two_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))
    yields = 0

    async def others() -> None:
        nonlocal yields
        while True:
            await asyncio.sleep(0)
            yields += 1

    other = asyncio.create_task(others())
    seen = []
    async for item in turns.in_turns(range(40)):
        seen.append(item)
        now += 0.001
    other.cancel()
    assert seen == list(range(40))
    assert 10 <= yields <= 20
