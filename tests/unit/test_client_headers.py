"""A client's header fields, from Create to the mail: written by their grammar, or refused by name."""

import email
import re
from email import policy
from email.header import decode_header, make_header

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from postroad.v1.task_service_pb2 import CreateRequest
from services.api.errors import InvalidArgument
from services.api.validation import task_created
from services.common.header_fields import canonical
from services.sender.composer import Composer

NOW = 1_800_000_000_000_000
COMPOSER = Composer("shop@a.test")


def mail(headers: dict[str, str]) -> bytes:
    """Return the mail of a Create with these headers."""
    data = {"email": "ann@ok.example", "subject": "s", "body": "b", "headers": headers}
    event = task_created(CreateRequest(data=data), "t", "", 1000, NOW)  # type: ignore[arg-type]
    return COMPOSER.compose(pb.MxOk(task=event.task), "<i@a.test>").message


def field(name: str, value: str) -> str:
    """Return the one field of this name in the mail, unfolded."""
    head = mail({name: value}).partition(b"\r\n\r\n")[0].decode()
    assert head.isascii()
    lines = re.sub(r"\r\n(?=[ \t])", "\0", head).split("\r\n")
    [found] = [line for line in lines if line.startswith(f"{name}: ")]
    for line in found.split("\0"):
        assert len(line) <= (76 if "=?" in found else 998)
    return found.replace("\0", "").removeprefix(f"{name}: ")


def refusal(name: str, value: str) -> str:
    """Return why a Create with this header is refused, after a check that the error names it."""
    with pytest.raises(InvalidArgument) as caught:
        mail({name: value})
    [violation] = caught.value.violations
    assert violation.field == f'data.headers["{name}"]'
    return violation.description


def mailboxes(name: str, value: str) -> list[tuple[str, str]]:
    """Return the display names and addresses that a mail reader finds in the field."""
    raw = field(name, value)
    # RFC 2047 section 5 (3) forbids encoded words in an addr-spec.
    assert not re.search(r"<[^>]*=\?", raw)
    parsed = policy.default.header_factory("Reply-To", raw)
    assert not parsed.defects
    if "=?" not in raw:
        return [(found.display_name, found.addr_spec) for found in parsed.addresses]
    # This parser drops the space between two encoded words (RFC 2047 section 6.2), the other one keeps it.
    parts = [part.rpartition("<") for part in raw.split(", ")]
    return [(str(make_header(decode_header(name.strip()))), spec.strip(">")) for name, _, spec in parts]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Zoë Tester <z.t@example.org>", [("Zoë Tester", "z.t@example.org")]),
        ('"Größe, Inc." <z@example.org>', [("Größe, Inc.", "z@example.org")]),
        ("Zoë <z@example.org>, 李 <l@example.org>", [("Zoë", "z@example.org"), ("李", "l@example.org")]),
        ("Zoë <z@bücher.example>", [("Zoë", "z@xn--bcher-kva.example")]),
        ("z@bücher.example", [("", "z@xn--bcher-kva.example")]),
        ('"Care Team, Billing" <care@example.com>', [("Care Team, Billing", "care@example.com")]),
        ("Joe Q. Public <j@example.org>", [("Joe Q. Public", "j@example.org")]),
        ("=?utf-8?q?Zo=C3=AB?= <z@example.org>", [("Zoë", "z@example.org")]),
        ("=?utf-8?q?Zo=C3=AB?= =?iso-8859-1?b?6Q==?= <z@example.org>", [("Zoëé", "z@example.org")]),
        ("=?utf-8?q?Doe=2C_Jane?= <z@example.org>", [("Doe, Jane", "z@example.org")]),
        ("a@example.org", [("", "a@example.org")]),
        ("a@example.org, b@example.org", [("", "a@example.org"), ("", "b@example.org")]),
        ("reply@localhost", [("", "reply@localhost")]),
        ("a@[192.0.2.1]", [("", "a@[192.0.2.1]")]),
        ("Ann (EU) <a@example.org> (Größe)", [("Ann", "a@example.org")]),
        (f"{'Zoë ' * 30}<z@example.org>", [(("Zoë " * 30).strip(), "z@example.org")]),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["Reply-To", "reply-to", "Disposition-Notification-To", "Mail-Followup-To", "Author", "Original-From"],
)
def test_only_the_name_beside_an_address_is_encoded(
    name: str, value: str, found: list[tuple[str, str]]
) -> None:
    assert mailboxes(name, value) == found


@pytest.mark.parametrize(
    "value", ["Support: a@example.org, Zoë <z@example.org>;", '"Größe, Inc.": a@b.test;']
)
def test_a_group_of_addresses_stays_a_group(value: str) -> None:
    [group] = policy.default.header_factory("Reply-To", field("Reply-To", value)).groups
    [asked] = policy.default.header_factory("Reply-To", value).groups
    assert group.display_name == asked.display_name
    assert group.addresses == asked.addresses


@pytest.mark.parametrize(
    "value",
    [
        "Care Team, Billing <care@example.com>",
        "Zoë, Billing <care@example.com>",
        "Care Team",
        "care@",
        "@example.com",
        "Care <>",
        "Care <care@example.com",
        "Care care@example.com",
        "a@b.test c@d.test",
        "a@b.test; c@d.test",
        "undisclosed:;",
        ",",
        '"',
        "a@[",
        "(" * 900,
        "a@-b.test",
        "a@b..test",
        "a@" + "b" * 64 + ".test",
        "é" * 33 + "@b.test",
        "a" * 65 + "@b.test",
        "zoë@example.org",
        "Zoë <zoë@example.org>",
        "=?utf-8?q?z=40example.org?=",
        "Zoë <=?utf-8?q?z?=@example.org>",
        "=?utf-8?q?z?= @example.org",
        '"=?utf-8?q?Zo=C3=AB?=" <z@example.org>',
        "=?utf-8?b?!!!?= <z@example.org>",
        "=?nonsense?q?x?= <z@example.org>",
        "=?utf-8?q?a=0D=0ABcc:_x@y.test?= <z@example.org>",
        "=?utf-8?q?a=00?= <z@example.org>",
        "=?nonsense?q?x?= =?nonsense?q?x?= <z@example.org>",
    ],
)
def test_anything_but_a_list_of_mailboxes_is_refused(value: str) -> None:
    assert refusal("Reply-To", value)


def test_an_address_that_is_too_long_is_refused_with_its_limits() -> None:
    assert "64 octets" in refusal("Reply-To", "a" * 65 + "@b.test")
    assert "254 octets" in refusal("Reply-To", "a@" + "b." * 130 + "test")


def test_a_field_is_given_once_whatever_its_case() -> None:
    with pytest.raises(InvalidArgument) as caught:
        mail({"Reply-To": "a@example.org", "reply-to": "b@example.org"})
    assert [violation.field for violation in caught.value.violations] == ['data.headers["reply-to"]']


@pytest.mark.parametrize(
    "value",
    [
        "<mailto:newsletter@example.com?subject=K%C3%BCndigen>",
        "<https://example.org/u?a=1&b=(2)#c>, <mailto:u@example.org>",
        "<https://example.org/u> (Leave, by the web), <mailto:u@example.org>",
        "<https://[2001:db8::1]/u>",
    ],
)
@pytest.mark.parametrize("name", ["List-Unsubscribe", "List-Help", "List-Post", "Archived-At", "LIST-OWNER"])
def test_uris_are_not_changed(name: str, value: str) -> None:
    assert field(name, value) == value


@pytest.mark.parametrize(
    "value",
    [
        "<mailto:newsletter@example.com?subject=Kündigen>",
        "<https://bücher.example/>",
        "=?utf-8?q?=3Chttps=3A=2F=2Fexample=2Eorg=3E?=",
        "https://example.org/u",
        "<https://example.org/u",
        "<example.org/u>",
        "<https://example.org/a b>",
        "<https://example.org/%C3%B>",
        '<https://example.org/"u">',
        "<https://example.org/u> <mailto:u@example.org>",
        "<https://example.org/u>,",
        "<>",
        "text",
    ],
)
def test_anything_but_a_list_of_uris_is_refused(value: str) -> None:
    assert "%C3%BC" in refusal("List-Unsubscribe", value)


def test_a_list_that_takes_no_mail_may_say_so() -> None:
    assert field("List-Post", "NO (posting not allowed)") == "NO (posting not allowed)"
    assert refusal("List-Help", "NO")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("<news.example.org>", ""),
        ("News of ours <news.example.org>", "News of ours"),
        ("Zoës Neues <news.example.org>", "Zoës Neues"),
        ('"Größe, Farbe" <news.example.org>', "Größe, Farbe"),
        ("=?utf-8?q?Gr=C3=B6=C3=9Fe?= <news.example.org>", "Größe"),
    ],
)
def test_only_the_name_beside_a_list_id_is_encoded(value: str, name: str) -> None:
    written, _, id_ = field("List-Id", value).rpartition("<")
    assert id_ == "news.example.org>"
    assert str(make_header(decode_header(written.strip()))).strip('"') == name


@pytest.mark.parametrize(
    "value",
    ["news.example.org", "<news>", "<bücher.example.org>", "<a.b> x", "a, b <a.b>", "<a b.c>", "a <b <c.d>"],
)
def test_anything_but_a_list_id_is_refused(value: str) -> None:
    assert "<news.example.org>" in refusal("List-Id", value)


def phrases(raw: str) -> list[str]:
    """Return the decoded phrases of a list, each parsed as a display name (RFC 5322 section 3.4)."""
    found = re.findall(r'(?:"(?:[^"\\]|\\.)*"|[^",])+', raw)
    parsed = policy.default.header_factory("Reply-To", ", ".join(f"{phrase} <k@b.test>" for phrase in found))
    assert not parsed.defects
    assert len(parsed.groups) == len(found)
    return [address.display_name for address in parsed.addresses]


@pytest.mark.parametrize(
    ("value", "keywords"),
    [
        ("Ünal, Test", ["Ünal", "Test"]),
        ("Grüße aus Köln, 李,news", ["Grüße aus Köln", "李", "news"]),
        ("plain", ["plain"]),
        ("one word, C++, #tag", ["one word", "C++", "#tag"]),
        ('"a, b", Ünal', ["a, b", "Ünal"]),
        ('"Größe, \\"Farbe\\"", x', ['Größe, "Farbe"', "x"]),
        ("Version 1.2, ü", ["Version 1.2", "ü"]),
        ("=?utf-8?q?Gr=C3=B6=C3=9Fe?=, x", ["Größe", "x"]),
        ("=?utf-8?q?a=2C_b?=, x", ["a, b", "x"]),
    ],
)
def test_each_keyword_is_encoded_by_itself(value: str, keywords: list[str]) -> None:
    assert phrases(field("Keywords", value)) == keywords


@pytest.mark.parametrize(
    "value",
    ["Ünal,", ",", "a,,b", "a <b@c.test>", "ü: b", '"ü', "ü (", "ü; b", "=?nonsense?q?x?=", "a\u2028b"],
)
def test_anything_but_a_list_of_keywords_is_refused(value: str) -> None:
    assert "comma separated" in refusal("Keywords", value)


@pytest.mark.parametrize("name", ["In-Reply-To", "References", "Supersedes", "Original-Message-ID"])
def test_message_ids_are_accepted_unchanged_or_refused(name: str) -> None:
    for value in ("<a@b>", "<a.b=c+d@[192.0.2.1]> <e@f>", "<a@b>\u0020\u0020<c@d>"):
        assert field(name, value) == value
    for value in (
        "a@b",
        "<zoë@example.org>",
        "<a@b",
        "Zoë <a@b>",
        "<ab>",
        "<a b@c>",
        "=?utf-8?q?=3Ca=40b=3E?=",
    ):
        assert "<left@right>" in refusal(name, value)


@pytest.mark.parametrize(
    "name", ["Auto-Submitted", "Precedence", "Importance", "List-Unsubscribe-Post", "Feedback-ID"]
)
def test_tokens_are_ascii(name: str) -> None:
    for value in (
        "auto-generated",
        'auto-replied; owner-email="a@b.test"',
        "List-Unsubscribe=One-Click",
        "a:b:c:d",
    ):
        assert field(name, value) == value
    for value in ("für-alle", "=?utf-8?q?bulk?=", "a\u2028b"):
        assert "ASCII" in refusal(name, value)


@pytest.mark.parametrize("name", ["Comments", "Organization", "X-Reply-To", "X-Anything"])
def test_free_text_is_encoded_as_a_whole(name: str) -> None:
    value = "Größe, Inc. <z@example.org>"
    raw = field(name, value)
    assert str(make_header(decode_header(raw))) == value
    assert field(name, "a, b <c@d.test>") == "a, b <c@d.test>"


def test_the_limit_applies_to_the_encoded_field() -> None:
    long = "Zoë " * 120 + "<z@example.org>"
    assert len(long) < 900
    assert "998" in refusal("Reply-To", long)
    assert "998" in refusal("Reply-To", "a@b.test, " * 100_000)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=60)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(["a@example.org", "b.c@xn--bcher-kva.example"])),
        min_size=1,
        max_size=4,
    )
)
@example([('a"b\\c', "a@example.org"), ("Ö" * 60, "a@example.org")])
@example([("=?utf-8?q?x?=", "a@example.org")])
def test_any_quoted_name_is_read_back(pairs: list[tuple[str, str]]) -> None:
    quoted = [(name.replace("\\", "\\\\").replace('"', '\\"'), spec) for name, spec in pairs]
    value = ", ".join(f'"{name}" <{spec}>' for name, spec in quoted)
    try:
        raw = field("Reply-To", value)
    except InvalidArgument:
        assert len(value) > 300 or "=?" in value
        return
    parsed = policy.default.header_factory("Reply-To", raw)
    assert not parsed.defects
    assert [found.addr_spec for found in parsed.addresses] == [spec for _, spec in pairs]
    # A mail reader drops white space between two encoded words, so it must be within one.
    shown = [found.display_name for found in parsed.addresses]
    assert ["".join(name.split()) for name in shown] == ["".join(name.split()) for name, _ in pairs]


ATOMS = st.text("abcXYZ019-+!'/=_?", min_size=1, max_size=8)
ADDRESSES = st.builds(
    "{}@{}".format, st.lists(ATOMS, min_size=1, max_size=3).map(".".join), st.sampled_from(["b", "b.test"])
)


@settings(max_examples=50)
@given(st.lists(ATOMS, max_size=3), ADDRESSES)
def test_the_fast_path_for_plain_mailboxes_agrees_with_the_parser(name: list[str], address: str) -> None:
    value = f"{' '.join(name)} <{address}>" if name else address
    # The space at the end disables the fast path, and the parser ignores it.
    assert canonical("Reply-To", value) == canonical("Reply-To", f"{value} ") == value


TRICKY = st.lists(
    st.sampled_from(
        ['"', "\\", "(", ")", "<", ">", "@", ",", ";", ":", ".", " ", "a", "é", "b.test", "[", "]"]
    )
    | st.sampled_from(["=?utf-8?q?", "?=", "=?utf-8?b?w6k=?=", "a@b.test", "<a@b.test>", "mailto:", "%C3"]),
    max_size=25,
).map("".join)


@given(
    st.sampled_from(["Reply-To", "List-Unsubscribe", "List-Id", "Keywords", "References", "Precedence"]),
    TRICKY,
)
def test_any_text_is_refused_by_name_or_written_by_its_grammar(name: str, value: str) -> None:
    try:
        raw = field(name, value)
    except InvalidArgument:
        assert refusal(name, value)
        return
    if name == "Reply-To":
        assert not policy.default.header_factory(name, raw).defects
    elif name == "Keywords":
        assert all(phrases(raw))
    elif name != "List-Id":
        assert raw == value.strip(" ")


def test_a_record_of_an_earlier_version_is_written_by_its_grammar_too() -> None:
    task = pb.MailTask(id=bytes(16), email="a@b.test", subject="s", body="")
    task.headers["Reply-To"] = "Zoë <z@example.org>"
    message = COMPOSER.compose(pb.MxOk(task=task), "<i@a.test>").message
    assert b"\r\nReply-To: =?utf-8?q?Zo=C3=AB?= <z@example.org>\r\n" in message
    assert email.message_from_bytes(message)["Reply-To"]
    task.headers["Reply-To"] = "Zoë <zoë@example.org>"
    with pytest.raises(ValueError, match="Reply-To"):
        COMPOSER.compose(pb.MxOk(task=task), "<i@a.test>")
