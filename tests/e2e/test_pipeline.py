"""The pipeline as a user sees it: every way a task can end, the payloads of existing clients."""

from __future__ import annotations

from collections.abc import Iterator
from email import message_from_bytes, policy
from pathlib import Path

import pytest

from tests.e2e.pipeline import Pipeline, until
from tests.reflection_client import ReflectionClient
from tests.stack import Stack

ENDS = [
    # recipient, status, reason, start of the reply, mails that the server took
    ("ada@good.test", "completed", "", "250", 1),
    ("ada@implicit.test", "completed", "", "250", 1),
    ("ada@mixed.test", "completed", "", "250", 1),
    ("ada@bücher.test", "completed", "", "250", 1),
    ("greylist@good.test", "completed", "", "250", 1),
    ("drop-before@good.test", "completed", "", "250", 1),
    ("drop-after@good.test", "completed", "", "250", 2),
    ("drop-lost@good.test", "completed", "", "250", 1),
    ("reject5@good.test", "failed", "rejected", "550", 0),
    ("data5@good.test", "failed", "rejected", "554", 0),
    ("ada@nowhere.test", "failed", "no_such_domain", "", 0),
    ("ada@nullmx.test", "failed", "null_mx", "", 0),
    ("ada@nomail.test", "failed", "no_mail_host", "", 0),
    ("ada@literal.test", "failed", "unusable_mx", "", 0),
]


@pytest.fixture(scope="module")
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


def test_every_end(pipeline: Pipeline) -> None:
    ids = [pipeline.create(email, subject=f"To {email}") for email, *_ in ENDS]
    tasks = pipeline.settled(ids)
    copies = pipeline.copies(ids)
    for id_, (email, status, reason, reply, mails) in zip(ids, ENDS, strict=True):
        task = tasks[id_]
        assert (task.status, task.reason) == (status, reason), email
        assert task.reply.startswith(reply), email
        assert copies[id_] == mails, email
        # A further copy needs an attempt in doubt.
        assert pipeline.doubts(id_) == (email in ("drop-after@good.test", "drop-lost@good.test")), email


def test_a_task_without_an_end_is_deferred(pipeline: Pipeline) -> None:
    waiting = {
        "reject4@good.test": ("processing", "450"),
        "shut421@good.test": ("processing", "421"),
        "data4@good.test": ("processing", "451"),
    }
    for id_, (status, reply) in [(pipeline.create(email), what) for email, what in waiting.items()]:
        task = until(lambda i=id_: (t := pipeline.get(i)).attempts and t, f"an attempt of {id_}")  # type: ignore[misc]
        assert task.status == status
        assert task.reply.startswith(reply)
        assert task.HasField("next_attempt_at")
    unanswered = pipeline.create("ada@servfail.test")
    task = until(lambda: (t := pipeline.get(unanswered)).reason and t, "the DNS failure on record")
    assert (task.status, task.reason) == ("pending", "dns_unavailable")
    assert pipeline.settled([unanswered], 60)[unanswered].status == "failed"


def test_the_mail_and_its_timeline(pipeline: Pipeline, stack: Stack) -> None:
    text = "Grüße,\n.a line with a dot\n" + "x" * 2000
    id_ = pipeline.create(
        "ada@good.test",
        "Zu Ihrer Anfrage — übermorgen",
        text,
        html="<p>Grüße</p>",
        headers={"Reply-To": "a@b.test"},
    )
    task = pipeline.settled([id_])[id_]
    assert task.message_id.strip("<>").startswith(id_)
    [entry] = [e for e in stack.journal() if e["message_id"] == task.message_id]
    path = Path(entry["path"])
    raw = (path if path.is_absolute() else stack.mail / path).read_bytes()
    mail = message_from_bytes(raw, policy=policy.default)
    assert mail["Subject"] == "Zu Ihrer Anfrage — übermorgen"
    assert mail["To"] == "ada@good.test"
    assert mail["Reply-To"] == "a@b.test"
    assert mail["Message-ID"] == task.message_id
    plain = mail.get_body(("plain",))
    assert plain is not None
    assert plain.get_content().replace("\r\n", "\n").rstrip("\n") == text
    assert mail.get_body(("html",)) is not None
    got = pipeline.get(id_)
    assert got.body == text
    assert got.html == "<p>Grüße</p>"
    assert [step.kind for step in got.timeline] == ["created", "mx_ok", "sent"]
    assert [step.stage for step in got.timeline] == ["api", "validator", "sender"]


def test_the_payloads_of_existing_clients(pipeline: Pipeline, stack: Stack) -> None:
    service = "postroad.v1.TaskService"
    with ReflectionClient(stack.env()["POSTROAD_API"]) as client:
        assert service in client.services()
        data = {"data": {"email": "old@good.test", "subject": "From an old client", "body": "As ever."}}
        made = client.call(f"{service}/Create", data)
        assert made["status"] == "pending"
        pipeline.settled([made["id"]])
        done = client.call(f"{service}/List", {"_filters": {"status": "completed"}})
        assert made["id"] in [row["id"] for row in done["results"]]
        shape = {"_filters": {"fields": {"status": {"string_value": "pending"}}}}
        rows = client.call(f"{service}/List", shape).get("results", [])
        assert all(row["status"] == "pending" for row in rows)
        for status in ("pending", "processing", "completed", "failed", "uncertain", "cancelled"):
            rows = client.call(f"{service}/List", {"_filters": {"status": status}}).get("results", [])
            assert all(row["status"] == status for row in rows)


def test_a_repeated_create_makes_one_task(pipeline: Pipeline) -> None:
    ids = pipeline.create_many(["ada@good.test"] * 3, "each-its-own")
    assert len(set(ids)) == 3
    first = pipeline.create("ada@good.test", key="once")
    assert pipeline.create("ada@good.test", key="once") == first
    pipeline.settled([*ids, first])
    pipeline.sent_once([*ids, first])
