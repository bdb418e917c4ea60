"""The composer: a task's envelope and message, the same in every attempt."""

import email
from email.policy import default

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import deliveries, widths
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


def test_a_domain_whose_message_ids_would_be_cut_in_the_database_is_refused() -> None:
    longest = ".".join(["b" * 63, "c" * 63, "d" * 63, "e" * 24])
    assert len(Composer(f"s@{longest}").message_id(ID)) == widths(deliveries)["message_id"] == 255
    with pytest.raises(ValueError, match="216 characters"):
        Composer(f"s@{longest}e")


def test_a_task_becomes_the_same_mail_each_time() -> None:
    composer = Composer("The Shop <shop@a.test>")
    mail = composer.compose(pb.MxOk(task=TASK, at_us=1), "<first@a.test>")
    assert composer.compose(pb.MxOk(task=TASK, at_us=2), "<first@a.test>") == mail
    assert (mail.mail_from, mail.rcpt) == ("shop@a.test", "ann@xn--bcher-kva.test")
    parsed = email.message_from_bytes(mail.message, policy=default)
    assert parsed["Message-ID"] == "<first@a.test>"
    assert parsed["From"] == "The Shop <shop@a.test>"
    assert parsed["To"] == "ann@xn--bcher-kva.test"
    assert parsed["Subject"] == "Grüße"
    assert parsed["X-Team"] == "red"
    assert parsed["Date"].datetime.timestamp() == 1_700_000_000
    assert [part.get_content_type() for part in parsed.iter_parts()] == ["text/plain", "text/html"]


@pytest.mark.parametrize(
    ("send_at_us", "epoch", "date"),
    [
        (0, 0, 1_700_000_000),
        (1_731_000_000_000_000, 0, 1_731_000_000),
        (0, 1_732_000_000_000, 1_732_000_000),
        (1_731_000_000_000_000, 1_732_000_000_000, 1_732_000_000),
        (1_731_000_000_000_000, 1_730_000_000_000, 1_731_000_000),
    ],
)
def test_the_date_is_when_the_task_was_to_be_sent_or_opened_again(
    send_at_us: int, epoch: int, date: int
) -> None:
    event = pb.MxOk(task=TASK, epoch=epoch, send_at_us=send_at_us, at_us=1_799_000_000_000_000)
    parsed = email.message_from_bytes(
        Composer("s@a.test").compose(event, "<i@a.test>").message, policy=default
    )
    assert parsed["Date"].datetime.timestamp() == date


def test_an_empty_body_is_a_body() -> None:
    task = pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s", body="")
    assert Composer("s@a.test").compose(pb.MxOk(task=task), "<i@a.test>").message.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "task",
    [
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s"),
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s\r\nBcc: x@y.test", body=""),
        pb.MailTask(id=ID, email="a b@b.test", domain="b.test", subject="s", body=""),
        pb.MailTask(id=ID, email="a@b.test", domain="b.test", subject="s", body="", headers={"To": "x"}),
    ],
)
def test_a_task_that_cannot_become_a_mail_is_a_value_error(task: pb.MailTask) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Composer("s@a.test").compose(pb.MxOk(task=task), "<i@a.test>")


@pytest.mark.parametrize(
    ("email_from", "name", "address"),
    [
        (r'"Ann \"AJ\" Lee, Inc. (EU)" <ann@example.org>', 'Ann "AJ" Lee, Inc. (EU)', "ann@example.org"),
        (r'"back\\slash" <b@example.org>', "back\\slash", "b@example.org"),
        ("=?UTF-8?B?QsOpY2Fzc2luZQ==?= <b@example.org>", "Bécassine", "b@example.org"),
        ("=?iso-8859-1?q?B=E9cassine?= <b@example.org>", "Bécassine", "b@example.org"),
        (
            "=?UTF-8?Q?B=C3=A9cas?= =?UTF-8?Q?sine=2C_Inc=2E?= <b@example.org>",
            "Bécassine, Inc.",
            "b@example.org",
        ),
        ("Bécassine <b@example.org>", "Bécassine", "b@example.org"),
        # Decoded once: the result is text, whatever it looks like.
        ("=?UTF-8?B?PT9VVEYtOD9RP3g/PQ==?= <b@example.org>", "=?UTF-8?Q?x?=", "b@example.org"),
        ("Ann (of the (EU) office) <ann@example.org> (main)", "Ann", "ann@example.org"),
        ("ann@example.org (Ann)", "", "ann@example.org"),
        ("Joe Q. Public <j@example.org>", "Joe Q. Public", "j@example.org"),
        ("  Shop   <shop@example.org> ", "Shop", "shop@example.org"),
        ("<shop@example.org>", "", "shop@example.org"),
        ("Größe <größe@bücher.test>", "Größe", "größe@xn--bcher-kva.test"),
        ("Postroad <postroad@localhost>", "Postroad", "postroad@localhost"),
    ],
)
def test_the_sender_is_parsed_as_a_header_field(email_from: str, name: str, address: str) -> None:
    mail = Composer(email_from).compose(pb.MxOk(task=TASK), "<i@a.test>")
    assert mail.mail_from == address
    parsed = email.message_from_string(mail.message.decode(), policy=default)
    [found] = parsed["From"].addresses
    assert (found.display_name, found.addr_spec) == (name, address)


@pytest.mark.parametrize(
    "address",
    [
        *("", " ", "shop", "shop@", "@a.test", "Shop <shop@a test>", "Shop shop@a.test", "<>"),
        *("Shop, Inc. <shop@a.test>", "Shop: shop@a.test;", "shop@a.test, b@a.test", "Shop <shop@a.test> x"),
        *('"Shop <shop@a.test>', '"Shop" shop@a.test', "Shop <shop@a.test", "Shop [EU] <shop@a.test>"),
        *("=?UTF-8?B?!!!?= <b@a.test>", "=?nonsense?q?x?= <b@a.test>", '"=?UTF-8?Q?x?=" <b@a.test>'),
        *(
            "Shop <=?UTF-8?Q?shop?=@a.test>",
            '"a b"@a.test',
            "a@b..test",
            "a@-b.test",
            "Post\nmaster <a@b.test>",
        ),
        *("=?UTF-8?Q?a=0D=0ABcc:_x@y.test?= <b@a.test>", "a@" + "b" * 64 + ".test", "ü" * 33 + "@b.test"),
    ],
)
def test_a_sender_that_is_no_mailbox_is_a_value_error_with_the_form_on_one_line(address: str) -> None:
    with pytest.raises(ValueError, match=r"Name <address>|254 octets") as caught:
        Composer(address)
    assert "\n" not in str(caught.value)
