"""The validation of a Create: each error names its field, and each limit is exact."""

import re

import pytest
from email_validator import EmailNotValidError, validate_email
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1.events_pb2 import MailTask, TaskCreated
from postroad.v1.task_service_pb2 import CreateRequest
from services.api.errors import InvalidArgument
from services.api.validation import MAX_AHEAD, encoded_length, task_created
from services.common.addresses import ascii_domain, normalise

MAX_BODY = 1000


NOW = 1_800_000_000_000_000
SECOND = 1_000_000


def mail_task(request_: CreateRequest, tenant: str, key_in_metadata: str, max_body: int) -> MailTask:
    return task_created(request_, tenant, key_in_metadata, max_body, NOW).task


def request(**data: object) -> CreateRequest:
    base: dict[str, object] = {"email": "a@shop.example", "subject": "Hello", "body": "text"}
    return CreateRequest(data={k: v for k, v in (base | data).items() if v is not None})  # type: ignore[arg-type]


def refused(**data: object) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        mail_task(request(**data), "default", "", MAX_BODY)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("given", "kept", "domain"),
    [
        ("Ann.Lee+x@Mail.Example.COM", "Ann.Lee+x@mail.example.com", "mail.example.com"),
        ("POSTMASTER@a.test", "postmaster@a.test", "a.test"),
        ("a@bücher.example", "a@bücher.example", "xn--bcher-kva.example"),
        ("a@xn--bcher-kva.example", "a@bücher.example", "xn--bcher-kva.example"),
        ("a@faß.invalid", "a@faß.invalid", "xn--fa-hia.invalid"),
        ("cafe\u0301@b.test", "caf\u00e9@b.test", "b.test"),
        ("用户@例え.test", "用户@例え.test", "xn--r8jz45g.test"),
        ("a@example.com", "a@example.com", "example.com"),
    ],
)
def test_an_address_is_normalised_and_its_domain_is_in_a_labels(given: str, kept: str, domain: str) -> None:
    task = mail_task(request(email=given), "t", "", MAX_BODY)
    assert (task.email, task.domain) == (kept, domain)


@pytest.mark.parametrize(
    "email",
    [
        "",
        "a",
        "@b.test",
        "a@",
        "a@b",
        "a@localhost",
        "a@test",
        "a@x.localhost",
        "a@b..test",
        "a@-b.test",
        "a@b.test.",
        ".a@b.test",
        "a.@b.test",
        "a b@c.test",
        " a@b.test",
        "a@b.test ",
        "a@b.test,c@d.test",
        "a@b.test; c@d.test",
        "a@@b.test",
        "Ann <a@b.test>",
        "<a@b.test>",
        '"a b"@c.test',
        "a@[127.0.0.1]",
        "a@1.2.3.4",
        "a@b.test\r\nBcc: c@d.test",
        "a@b.test\n",
        "a\0@b.test",
        "a\u2028@b.test",
        "a\u2029@b.test",
        "a@b\u0085.test",
        "a\u202e@b.test",
        "a" * 65 + "@b.test",
        "a@" + "b" * 64 + ".test",
        "a@" + "b." * 126 + "test",
        "a" * 100_000,
        "a@xn--0.test",
    ],
)
def test_anything_but_a_single_address_is_refused(email: str) -> None:
    assert refused(email=email) == ["data.email"]


@pytest.mark.parametrize(
    "email",
    [
        "a" * 65 + "@b.test",
        "é" * 33 + "@b.test",
        "é" * 64 + "@b.test",
        "a@" + "b" * 64 + ".test",
        "a@" + "é" * 60 + ".test",
        "a@" + "b." * 126 + "test",
        "a@" + "é." * 60 + "test",
        "a" * 64 + "@" + ("b" * 60 + ".") * 3 + "b.testing",
        "a" * 100_000,
    ],
)
def test_an_address_that_is_too_long_is_refused_with_the_limits(email: str) -> None:
    with pytest.raises(ValueError, match=r"254 octets.* 64 octets.* 63 octets"):
        normalise(email)


@pytest.mark.parametrize("domain", ["b" * 64 + ".test", "b." * 126 + "test", "é" * 60 + ".test", "b." * 1000])
def test_a_domain_that_is_too_long_is_refused_with_the_limits(domain: str) -> None:
    with pytest.raises(ValueError, match=r"253 octets.* 63 octets"):
        ascii_domain(domain)


@given(st.emails())
def test_normalising_twice_changes_nothing(address: str) -> None:
    try:
        once, domain = normalise(address)
    except ValueError:
        return
    assert normalise(once) == (once, domain)
    assert ascii_domain(domain) == domain


PLAIN = st.text("abcXYZ019.-_+!'/=@\"<> ", max_size=70)


@given(
    st.one_of(
        st.builds("{}@{}".format, PLAIN, st.sampled_from(["b.test", "B.Test", "xn--0.test", "a--b.test"])),
        st.builds("{}@{}".format, st.sampled_from(["a", "INFO", "a" * 64, "a" * 65, "a.b"]), PLAIN),
        st.builds("{}@{}".format, PLAIN, st.text("ab.", min_size=170, max_size=260)),
        st.emails(),
    )
)
def test_the_fast_path_for_plain_addresses_agrees_with_the_library(address: str) -> None:
    try:
        library = validate_email(address, strict=True, check_deliverability=False)
        expected = (library.normalized, library.ascii_domain)
    except EmailNotValidError:
        expected = None
    for _ in range(2):
        try:
            found = normalise(address)
        except ValueError:
            found = None
        assert found == expected


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_refusal(text: str) -> None:
    try:
        email, domain = normalise(text)
    except ValueError:
        return
    assert email.count("@") == 1
    assert email.isprintable()
    assert domain.isascii()


@pytest.mark.parametrize("subject", [None, "", " ", "\u3000"])
def test_a_blank_subject_is_refused(subject: str | None) -> None:
    assert refused(subject=subject) == ["data.subject"]


@pytest.mark.parametrize("code", [0, 9, 10, 13, 27, 31, 127, 128, 0x9F])
def test_control_characters_are_refused_in_subjects_and_headers(code: int) -> None:
    bad = f"a{chr(code)}b"
    assert refused(subject=bad) == ["data.subject"]
    assert refused(headers={"X-A": bad}) == ['data.headers["X-A"]']
    assert refused(labels={"a": bad}) == ['data.labels["a"]']
    assert refused(email=f"{bad}@c.test") == ["data.email"]


@pytest.mark.parametrize("subject", ["a\u2028b", "a\u2029b", "a\u0085b", "👍", "\u202eabc", "=?utf-8?q?a?="])
def test_a_subject_may_have_characters_that_need_encoding(subject: str) -> None:
    assert mail_task(request(subject=subject), "t", "", MAX_BODY).subject == subject


def test_a_subject_has_998_bytes_encoded() -> None:
    longest = max(n for n in range(998) if encoded_length("é" * n) <= 998)
    for subject in ("a" * 998, "é" * longest):
        mail_task(request(subject=subject), "t", "", MAX_BODY)
    for subject in ("a" * 999, "é" * (longest + 1), "a" * 1_000_000):
        assert refused(subject=subject) == ["data.subject"]


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=400))
def test_the_encoded_length_is_within_a_word_of_base64(subject: str) -> None:
    size = len(subject.encode())
    assert size <= encoded_length(subject) <= size * 4 / 3 + 3 + 13 * (size / 45 + 1)


def test_text_and_html_share_one_limit() -> None:
    mail_task(request(body="b" * MAX_BODY), "t", "", MAX_BODY)
    mail_task(request(body="b" * 400, html="h" * 600), "t", "", MAX_BODY)
    mail_task(request(body="é" * (MAX_BODY // 2)), "t", "", MAX_BODY)
    assert refused(body="b" * (MAX_BODY + 1)) == ["data.body"]
    assert refused(body="é" * (MAX_BODY // 2) + "b") == ["data.body"]
    assert refused(body="b" * 400, html="h" * 601) == ["data.html"]


def test_a_body_may_be_empty_but_not_absent_unless_there_is_html() -> None:
    assert refused(body=None) == ["data.body"]
    empty = mail_task(request(body=""), "t", "", MAX_BODY)
    assert empty.HasField("body")
    only_html = mail_task(request(body=None, html="<p>"), "t", "", MAX_BODY)
    assert not only_html.HasField("body")
    assert only_html.html == "<p>"


@pytest.mark.parametrize(
    "name",
    [
        *("From", "to", "CC", "bcc", "Sender", "Subject", "Date", "Message-ID", "MIME-Version", "Received"),
        *("Content-Type", "content-x", "Return-Path", "DKIM-Signature", "Resent-To"),
        *("", "X A", "X:A", "Ü", "X\n", "X" * 77),
    ],
)
def test_a_reserved_header_is_refused(name: str) -> None:
    [field] = refused(headers={name: "v"})
    assert field.startswith('data.headers["')
    assert "\n" not in field


def test_the_limits_of_headers() -> None:
    fifty = {f"X-{n}": "v" for n in range(50)}
    assert mail_task(request(headers=fifty), "t", "", MAX_BODY).headers == fifty
    assert refused(headers=fifty | {"Y": "v"}) == ["data.headers"]
    assert refused(headers={"X-A": "1", "x-a": "2"}) == ['data.headers["x-a"]']
    assert refused(headers={"X-A": " "}) == ['data.headers["X-A"]']
    mail_task(request(headers={"X-A": "v" * 993}), "t", "", MAX_BODY)
    assert refused(headers={"X-A": "v" * 994}) == ['data.headers["X-A"]']


def test_the_limits_of_labels() -> None:
    most = {f"{n:063}": "é" * 127 for n in range(64)}
    assert mail_task(request(labels=most), "t", "", MAX_BODY).labels == most
    assert refused(labels=most | {"x": ""}) == ["data.labels"]
    assert refused(labels={"": "v"}) == ['data.labels[""]']
    [long] = refused(labels={"k" * 64: "v"})
    assert long.startswith('data.labels["kkk')
    assert refused(labels={"k": "v" * 256}) == ['data.labels["k"]']


def test_all_invalid_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        mail_task(CreateRequest(), "t", "", MAX_BODY)
    assert [v.field for v in caught.value.violations] == ["data.email", "data.subject", "data.body"]


@pytest.mark.parametrize(
    ("in_request", "in_metadata", "key"),
    [
        ("", "", ""),
        ("a", "", "a"),
        ("", "a", "a"),
        ("a", "a", "a"),
        ("é" * 127, "", "é" * 127),
        (" ", "", " "),
    ],
)
def test_the_key_comes_from_the_request_or_the_metadata(in_request: str, in_metadata: str, key: str) -> None:
    request_ = request()
    request_.idempotency_key = in_request
    task = mail_task(request_, "t", in_metadata, MAX_BODY)
    assert task.idempotency_key == key
    assert bool(task.request_hash) == bool(key)


@pytest.mark.parametrize(
    ("in_request", "in_metadata"),
    [("a", "b"), ("k" * 256, ""), ("", "k" * 256), ("é" * 128, ""), ("a\n", ""), ("\0", "")],
)
def test_invalid_keys_are_named_with_the_other_fields(in_request: str, in_metadata: str) -> None:
    request_ = request(email="x")
    request_.idempotency_key = in_request
    with pytest.raises(InvalidArgument) as caught:
        mail_task(request_, "t", in_metadata, MAX_BODY)
    assert [v.field for v in caught.value.violations] == ["data.email", "idempotency_key"]


def hash_of(**data: object) -> bytes:
    return mail_task(request(**data), "t", "key", MAX_BODY).request_hash


def test_different_requests_have_different_hashes() -> None:
    assert mail_task(request(), "t", "", MAX_BODY).request_hash == b""
    assert hash_of(email="a@SHOP.example") == hash_of()
    assert hash_of(labels={"a": "1", "b": "2"}) == hash_of(labels={"b": "2", "a": "1"})
    variants: list[dict[str, object]] = [
        {},
        {"email": "b@shop.example"},
        {"subject": "Hello!"},
        {"body": ""},
        {"body": None, "html": "text"},
        {"html": ""},
        {"html": "x"},
        {"body": None, "html": ""},
        {"headers": {"X-A": "b"}},
        {"labels": {"X-A": "b"}},
        {"labels": {"X-A": "", "b": ""}},
        {"labels": {"X-Ab": ""}},
    ]
    hashes = [hash_of(**variant) for variant in variants]
    assert len({*hashes}) == len(variants)
    assert {len(value) for value in hashes} == {32}


def test_the_request_hash_covers_headers_as_they_were_given() -> None:
    # A later version may write headers differently, and a key must still return its task.
    given = {"Reply-To": "Zoë Tester  <z.t@Example.org>", "X-A": "é"}
    assert hash_of(headers=given).hex() == "63fa7ce2687e7b2edfb1a33121c76bf1d7dd97faf5b2321dae4e42a5958807dc"


def scheduled(seconds: int, nanos: int = 0, key: str = "") -> TaskCreated:
    request_ = request()
    request_.send_at.seconds, request_.send_at.nanos = seconds, nanos
    return task_created(request_, "t", key, MAX_BODY, NOW)


def test_a_send_time_is_never_rounded_down() -> None:
    assert task_created(request(), "t", "", MAX_BODY, NOW).send_at_us == 0
    now = NOW // SECOND
    assert scheduled(now + 1).send_at_us == NOW + SECOND
    assert scheduled(now, 1).send_at_us == NOW + 1
    assert scheduled(now, 1001).send_at_us == NOW + 2
    assert scheduled(now + MAX_AHEAD).send_at_us == NOW + MAX_AHEAD * SECOND
    # A past time sends at once, like none.
    for past in (now, now - 1, 0, -62135596800):
        assert scheduled(past).send_at_us == 0


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [
        (NOW // SECOND + MAX_AHEAD, 1),
        (253402300799, 0),
        (253402300800, 0),
        (-62135596801, 0),
        (NOW // SECOND, -1),
        (NOW // SECOND, 10**9),
    ],
)
def test_an_invalid_or_too_late_send_time_is_named_with_the_other_fields(seconds: int, nanos: int) -> None:
    request_ = request(email="x")
    request_.send_at.seconds, request_.send_at.nanos = seconds, nanos
    with pytest.raises(InvalidArgument) as caught:
        task_created(request_, "t", "", MAX_BODY, NOW)
    assert [v.field for v in caught.value.violations] == ["data.email", "send_at"]
    assert re.search("RFC 3339|365 days", caught.value.violations[1].description)


def test_the_request_hash_covers_the_send_time_even_after_it_has_passed() -> None:
    hashes = [scheduled(NOW // SECOND + n, key="k").task.request_hash for n in (-1, 0, 1, 2)]
    assert len({*hashes, hash_of()}) == 5
    request_ = request()
    request_.send_at.FromSeconds(NOW // SECOND + 5)
    before, after = (task_created(request_, "t", "k", MAX_BODY, NOW + n * SECOND) for n in (0, 9))
    assert (before.send_at_us, after.send_at_us) == (NOW + 5 * SECOND, 0)
    assert before.task.request_hash == after.task.request_hash
