"""``message.build``: every mail is parsed back with the standard library and compared."""

import email
import re
from email import policy
from email.header import decode_header, make_header
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.sender.message import OWN_HEADERS, build

BASE: dict[str, Any] = {
    "message_id": "<0190f5e0-0000-7000-8000-000000000001@example.org>",
    "from_addr": "shop@example.org",
    "to_addr": "ann@example.net",
    "subject": "Your order",
    "date": 1_700_000_000,
}
# The api lets no surrogates through, and refuses CR, LF and NUL in header fields.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=3000)
TRICKY_TEXT = st.lists(
    st.sampled_from(["\r", "\n", "\r\n", ".", " ", "\t", "=", "=?utf-8?q?x?=", "From ", "a" * 998, "a" * 999])
    | st.sampled_from(["é", "\u2028", "\x85", "\x00", "\x0b", "\x1b", "--=_", "--", "word ", "\U0001f4ee"]),
    max_size=40,
).map("".join)
BODIES = ANY_TEXT | TRICKY_TEXT
LINE_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=400)
TRICKY_LINE = st.lists(
    st.sampled_from(
        ["=?", "?=", "=?utf-8?q?x?=", " ", "  ", "\t", "é", "word", "x" * 80, '"', "\\", ",", "<a@b>"]
    )
    | st.sampled_from(["\u2028", "\u2029", "\x85", "\x1b", "\U0001f4ee", "_", "="]),
    max_size=30,
).map("".join)
SUBJECTS = LINE_TEXT | TRICKY_LINE
ATOM = st.from_regex(r"[a-z0-9!#$%&'*+/^_`{|}~-]{1,20}(\.[a-z0-9]{1,10})?", fullmatch=True)
ADDRESSES = st.builds(
    "{}@{}".format, ATOM, st.sampled_from(["example.org", "xn--bcher-kva.example", "[192.0.2.1]"])
)


def parse(data: bytes) -> EmailMessage:
    message = email.message_from_bytes(data, policy=policy.SMTP)
    assert isinstance(message, EmailMessage)
    return message


def canonical(text: str) -> str:
    """Return a body as the parser must return it: LF line ends, the last line closed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text + "\n" if text and not text.endswith("\n") else text


def content(part: EmailMessage) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode().replace("\r\n", "\n")


def assert_fit_for_smtp(data: bytes) -> None:
    """Check the rules of RFC 5321 §2.3.8 and RFC 5322 §2.1.1."""
    assert data.endswith(b"\r\n")
    assert data.count(b"\r") == data.count(b"\n") == data.count(b"\r\n")
    assert b"\0" not in data
    assert max(map(len, data.split(b"\r\n"))) <= 998
    head = data.partition(b"\r\n\r\n")[0]
    for line in head.split(b"\r\n"):
        assert line.strip(b" \t"), "a folded line of white space alone is obsolete syntax"


@given(BODIES)
@example("")
@example(".")
@example("\n.\n..\n")
@example("x" * 998)
@example("x" * 999)
@example("trailing \nand tab\t\n")
@example("a\r\rb\n\rc")
def test_text_comes_back(text: str) -> None:
    data = build(**BASE, text=text)
    assert_fit_for_smtp(data)
    message = parse(data)
    assert message.get_content_type() == "text/plain"
    assert not message.defects
    assert content(message) == canonical(text)
    assert data.isascii()


@given(BODIES, BODIES)
def test_both_bodies_come_back_as_alternatives(text: str, html: str) -> None:
    data = build(**BASE, text=text, html=html)
    assert_fit_for_smtp(data)
    message = parse(data)
    assert message.get_content_type() == "multipart/alternative"
    parts = list(message.iter_parts())
    assert [p.get_content_type() for p in parts] == ["text/plain", "text/html"]
    assert [content(p) for p in parts if isinstance(p, EmailMessage)] == [canonical(text), canonical(html)]


def test_html_alone_is_a_single_part() -> None:
    message = parse(build(**BASE, html="<p>ä</p>"))
    assert message.get_content_type() == "text/html"
    assert content(message) == "<p>ä</p>\n"


@given(SUBJECTS)
@example("x" * 998)
@example(" leading and trailing ")
@example("a\u2028b\u2029c\x85d")
@example("=?utf-8?q?forged?=")
@example("\U0001f4ee" * 200)
@example("é" + "a" * 300)
@example("word " * 60 + "end")
def test_subject_comes_back(subject: str) -> None:
    data = build(**(BASE | {"subject": subject}), text="x")
    assert_fit_for_smtp(data)
    assert parse(data)["subject"] == subject
    field = re.search(rb"^Subject:.*?\r\n(?! )", data, re.M | re.S)
    assert field
    lines = field.group().rstrip().split(b"\r\n")
    assert max(map(len, lines)) <= (76 if b"=?" in field.group() else 78)
    for word in re.findall(rb"=\?utf-8\?[bq]\?[^?]*\?=", field.group()):
        assert len(word) <= 75
        decoded, _ = decode_header(word.decode())[0]
        assert isinstance(decoded, bytes)
        decoded.decode()  # no character is split between two words (RFC 2047 §5)


def test_a_subject_never_contains_raw_line_separators() -> None:
    data = build(**(BASE | {"subject": "a\u2028b\u2029c\x85d"}), text="x")
    assert "\u2028".encode() not in data
    assert "\x85".encode() not in data


@given(
    ADDRESSES,
    ADDRESSES,
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80).map(str.strip)
    | st.text(st.characters(categories=["L", "N"]), max_size=80),
)
@example("a@example.org", "b@example.org", 'He said "no", \\ twice')
@example("a@example.org", "b@example.org", "Größe, Inc.")
def test_addresses_and_display_name_come_back(sender: str, recipient: str, name: str) -> None:
    data = build(
        **(BASE | {"from_addr": sender, "to_addr": recipient}), from_name=name, reply_to=sender, text="x"
    )
    assert_fit_for_smtp(data)
    message = parse(data)
    (mailbox,) = message["from"].addresses
    assert mailbox.addr_spec == sender
    # The standard library's parser joins runs of white space in a name. It keeps the space between two
    # encoded words of a phrase, which RFC 2047 §6.2 drops, as the library's older decoder does.
    if "=?utf-8?" in (raw := str(email.message_from_bytes(data, policy=policy.compat32)["from"])):
        raw_name = raw.rpartition("<")[0]
        assert str(make_header(decode_header(raw_name))).split() == name.split()
    else:
        assert mailbox.display_name.split() == name.split()
    assert [a.addr_spec for a in message["to"].addresses] == [recipient]
    assert [a.addr_spec for a in message["reply-to"].addresses] == [sender]
    assert not message["from"].defects


def test_utf8_local_part_is_sent_raw() -> None:
    data = build(**(BASE | {"to_addr": "büro@xn--bcher-kva.example"}), text="x")
    assert "To: büro@xn--bcher-kva.example\r\n".encode() in data
    assert parse(data)["to"] == "büro@xn--bcher-kva.example"


def test_identity_fields() -> None:
    message = parse(build(**BASE, text="x"))
    assert message["message-id"] == BASE["message_id"]
    assert message["date"].datetime.timestamp() == 1_700_000_000
    assert message["date"].endswith("+0000")
    assert message["mime-version"] == "1.0"


def test_same_arguments_same_bytes() -> None:
    arguments: dict[str, Any] = BASE | {"text": "é", "html": "<b>", "headers": {"X-A": "1"}}
    assert build(**arguments) == build(**arguments)


def test_no_body_contains_the_boundary() -> None:
    first = build(**BASE, text="x", html="y")
    boundary = parse(first).get_boundary()
    assert boundary
    hostile = f"--{boundary}\n\n--{boundary}--\n"
    message = parse(build(**BASE, text=hostile, html=hostile))
    assert message.get_boundary() != boundary
    assert [content(p) for p in message.iter_parts() if isinstance(p, EmailMessage)] == [hostile, hostile]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=600).map(str.strip))
def test_extra_header_comes_back_unencoded(value: str) -> None:
    data = build(**BASE, text="x", headers={"X-Labels": value})
    assert_fit_for_smtp(data)
    raw = email.message_from_bytes(data, policy=policy.compat32)["X-Labels"]
    assert re.sub(r"\r\n(?=[ \t])", "", raw) == value


def test_extra_header_of_free_text_is_encoded() -> None:
    assert parse(build(**BASE, text="x", headers={"Comments": "Größe"}))["comments"] == "Größe"


def test_long_url_in_a_header_is_neither_split_nor_encoded() -> None:
    url = "<https://example.org/" + "u" * 700 + ">"
    assert f"List-Unsubscribe: {url}\r\n".encode() in build(
        **BASE, text="x", headers={"List-Unsubscribe": url}
    )


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        ("plain", "7bit"),
        ("x" * 998, "7bit"),
        ("x" * 999, "quoted-printable"),
        (("x" * 900 + "\n") * 3, "7bit"),
        ("é", "quoted-printable"),
        ("\0", "quoted-printable"),
        ("\x1b[0m", "quoted-printable"),
        ("tab\there", "7bit"),
    ],
)
def test_transfer_encoding(body: str, encoding: str) -> None:
    assert parse(build(**BASE, text=body))["content-transfer-encoding"] == encoding


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject": "a\r\nBcc: x@example.org"},
        {"subject": "a\nb"},
        {"subject": "a\rb"},
        {"subject": "a\0b"},
        {"from_name": "a\r\nb"},
        {"from_name": "é\nb"},
        {"to_addr": "a@example.net\r\nBcc: x@example.org"},
        {"to_addr": "a b@example.net"},
        {"to_addr": "a@bücher.example"},
        {"to_addr": "a,b@example.net"},
        {"to_addr": "<a@example.net>"},
        {"to_addr": "a\u2028@example.net"},
        {"to_addr": "a\x85@example.net"},
        {"to_addr": "a@"},
        {"to_addr": ""},
        {"from_addr": "a..b@example.net"},
        {"reply_to": "nobody"},
        {"message_id": "no-brackets@example.org"},
        {"message_id": "<a@b>\r\nX: y"},
        {"message_id": "<a b@c>"},
        {"date": float("nan")},
        {"date": float("inf")},
        {"date": -1},
        {"date": 253_402_300_800},
        {"headers": {"X-A": "a\r\nBcc: x@example.org"}},
        {"headers": {"X-A": "é\nb"}},
        {"headers": {"X-A": "a\x07"}},
        {"headers": {"X-A": "a" * 999}},
        {"headers": {"X A": "a"}},
        {"headers": {"X:A": "a"}},
        {"headers": {"": "a"}},
        {"headers": {"Größe": "a"}},
        {"headers": {"Reply-To": "a@b.example"}, "reply_to": "c@d.example"},
        {"text": "\ud800"},
        {"text": None},
    ],
)
def test_a_mail_that_cannot_be_sent_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (each message names its own field)
        build(**(BASE | {"text": "x"} | wrong))


@pytest.mark.parametrize("name", sorted(OWN_HEADERS))
def test_own_headers_cannot_be_given(name: str) -> None:
    with pytest.raises(ValueError, match="written by the sender"):
        build(**BASE, text="x", headers={name.title(): "a"})
