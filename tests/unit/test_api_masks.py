"""What an operator sees of another tenant's mail."""

from __future__ import annotations

import pytest

from postroad.v1.task_pb2 import Task, TimelineEntry
from postroad.v1.task_service_pb2 import WatchResponse
from services.api.call import Call, Metadata
from services.api.masks import mask, mask_watch_response
from services.common.grants import Grant

REPLY = "550 5.1.1 <ada@shop.test>: no such user ada"


def task() -> Task:
    entry = TimelineEntry(stage="sender", kind="failed", reply=REPLY, detail="refused ada@shop.test, code 5")
    return Task(
        id="019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071",
        email="ada@shop.test",
        subject="Your secret order",
        body="secret text",
        html="<b>secret</b>",
        status="failed",
        reason="rejected",
        reply=REPLY,
        labels={"list": "news"},
        timeline=[entry],
    )


def test_addresses_subjects_and_bodies_are_masked_and_what_an_operator_needs_stays() -> None:
    found = mask(task())
    assert (found.email, found.subject, found.body, found.html) == ("***@shop.test", "***", "***", "***")
    assert (found.reply, found.timeline[0].reply) == ("550 5.1.1 ***", "550 5.1.1 ***")
    assert found.timeline[0].detail == "refused *** code 5"
    assert (found.status, found.reason, dict(found.labels)) == ("failed", "rejected", {"list": "news"})
    for secret in ("ada", "secret"):
        assert secret not in str(found)


def test_what_is_empty_stays_so() -> None:
    assert mask(Task(id="x")) == Task(id="x")


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("", ""),
        ("250 ok ada@shop.test", "250 ***"),
        ("250-2.0.0 queued", "250-2.0.0 ***"),
        ("451", "451 ***"),
        ("ada@shop.test is unknown", "***"),
        ("550ada@shop.test", "***"),
        ("550 5.1.1ada@shop.test", "550 ***"),
    ],
)
def test_a_reply_keeps_its_codes_alone(reply: str, shown: str) -> None:
    assert mask(Task(reply=reply)).reply == shown


def test_a_watch_message_is_masked_and_keeps_its_token() -> None:
    full = WatchResponse(task=task(), change=task().timeline[0], resume_token="t")
    found = WatchResponse.FromString(mask_watch_response(full.SerializeToString()))
    assert (found.task.email, found.change.reply, found.resume_token) == (
        "***@shop.test",
        "550 5.1.1 ***",
        "t",
    )
    token_alone = WatchResponse(resume_token="t").SerializeToString()
    assert mask_watch_response(token_alone) == token_alone


@pytest.mark.parametrize(
    ("scopes", "tenant", "sees"),
    [("read,operate", "shop", False), ("read,operate", "ops", True), ("read,operate,content", "shop", True)],
)
def test_content_is_shown_to_its_tenant_and_by_the_scope(scopes: str, tenant: str, sees: bool) -> None:
    grant = Grant("id", "ops", b"digest", frozenset(scopes.split(",")))
    assert Call("ops", Metadata(()), 0, grant).sees_content(tenant) is sees
