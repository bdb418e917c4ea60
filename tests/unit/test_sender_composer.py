"""The composer: envelope and message of a task, the same at every attempt."""

import email
from email.policy import default

import pytest

from postroad.v1 import events_pb2 as pb
from services.sender.composer import Composer

ID = bytes.fromhex("0190f5e0000070008000000000000001")
TASK = pb.MailTask(
    id=ID,
    email="ann@bücher.test",
    domain="xn--bcher-kva.test",
    subject="Grüße",
    body="text\n",
    html="<p>text</p>",
    headers={"X-Team": "red"},
    created_at_us=1_700_000_000_999_999,
)


def test_the_message_id_is_made_of_the_task_and_the_senders_domain() -> None:
    assert Composer("shop@a.test").message_id(ID) == "<0190f5e0-0000-7000-8000-000000000001@a.test>"
    assert Composer('"The Shop" <shop@bücher.test>').message_id(ID).endswith("@xn--bcher-kva.test>")


def test_a_task_becomes_the_same_mail_each_time() -> None:
    composer = Composer("The Shop <shop@a.test>")
    mail = composer.compose(TASK, "<first@a.test>")
    assert composer.compose(TASK, "<first@a.test>") == mail
    assert (mail.mail_from, mail.rcpt) == ("shop@a.test", "ann@xn--bcher-kva.test")
    parsed = email.message_from_bytes(mail.message, policy=default)
    assert parsed["Message-ID"] == "<first@a.test>"
    assert parsed["From"] == "The Shop <shop@a.test>"
    assert parsed["To"] == "ann@xn--bcher-kva.test"
    assert parsed["Subject"] == "Grüße"
    assert parsed["X-Team"] == "red"
    assert parsed["Date"].datetime.timestamp() == 1_700_000_000
    assert [part.get_content_type() for part in parsed.iter_parts()] == ["text/plain", "text/html"]


def test_an_empty_body_is_a_body() -> None:
    task = pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s", body="")
    assert Composer("s@a.test").compose(task, "<i@a.test>").message.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "task",
    [
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s"),
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s\r\nBcc: x@y.test", body=""),
        pb.MailTask(id=ID, email="a b@b.test", domain="b.test", subject="s", body=""),
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s", body="", headers={"To": "x"}),
    ],
)
def test_what_is_no_mail_is_a_value_error(task: pb.MailTask) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Composer("s@a.test").compose(task, "<i@a.test>")


@pytest.mark.parametrize(
    "address", ["", "shop", "shop@", "@a.test", "Shop <shop@a test>", "Shop shop@a.test"]
)
def test_a_sender_that_is_no_address_is_a_value_error(address: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Composer(address)
