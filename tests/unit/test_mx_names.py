"""Domain names in every form that a client may write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.validator.names import is_address_literal, is_localhost, to_ascii


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("example.test", "example.test"),
        ("Example.TEST.", "example.test"),
        (" example.test ", "example.test"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example.", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
        ("\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45.test", "example.test"),
        ("_dmarc.example.test", "_dmarc.example.test"),
        ("a" * 63 + ".test", "a" * 63 + ".test"),
    ],
)  # fmt: skip
def test_to_ascii(written: str, name: str) -> None:
    assert to_ascii(written) == name


@pytest.mark.parametrize(
    "written",
    [
        "", ".", "a..test", ".test", "a" * 64 + ".test", "a." * 127 + "a", "exa mple.test", "a@b.test",
        "a\\.test", "a\x00.test", "192.0.2.1", "[192.0.2.1]", "2001:db8::1", "ü" * 64 + ".test",
        "☃\u200d.test", "a\n.test", "example.test\nb", "[IPv6:::1]",
    ],
)  # fmt: skip
def test_a_text_that_is_no_domain_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is not a domain name"):
        to_ascii(written)


@given(st.text(max_size=300))
def test_any_text_is_a_question_for_the_dns_or_refused(text: str) -> None:
    try:
        name = to_ascii(text)
    except ValueError:
        return
    assert name.isascii()
    assert len(name) <= 253
    assert to_ascii(name) == name == name.lower()
    assert all(1 <= len(label) <= 63 for label in name.split("."))


def test_localhost_is_the_last_label() -> None:
    assert is_localhost("localhost")
    assert is_localhost("a.localhost")
    assert not is_localhost("localhost.test")
    assert not is_localhost("mylocalhost")


def test_address_literals() -> None:
    assert all(map(is_address_literal, ["192.0.2.1", "[192.0.2.1]", "::1", "[::1]", "[IPv6:2001:db8::1]"]))
    assert not any(map(is_address_literal, ["a.test", "1.test", "192.0.2", "192.0.2.1.test", "", "[]"]))
