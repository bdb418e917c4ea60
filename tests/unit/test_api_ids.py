"""Task ids and page tokens."""

from __future__ import annotations

import base64
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api import errors, page_tokens, uuid7
from services.api.token_keys import TokenKeys

KEYS = TokenKeys([b"k" * 32])


def test_ids_are_uuid7_and_rise_strictly_whatever_the_clock_shows() -> None:
    times = iter([5_000_000, 5_000_999, 5_001_000, 3_000_000, 3_000_000, 9_000_000_000_000_000])
    generator = uuid7.IdGenerator(lambda: next(times))
    made = [generator.new() for _ in range(6)]
    assert [us for _, us in made] == [5000, 5001, 5002, 5003, 5004, 9_000_000_000_000]
    assert sorted(made) == made
    for id_, us in made:
        parsed = uuid.UUID(bytes=id_)
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert int.from_bytes(id_[:6], "big") == us // 1000
        assert uuid7.text(id_) == str(parsed)
        assert uuid7.parse(uuid7.text(id_)) == uuid7.parse(uuid7.text(id_).upper()) == id_


@given(st.integers(0, 2**48 * 1000 - 1), st.integers(0, 2**48 * 1000 - 1))
def test_a_range_of_times_is_a_range_of_ids(us: int, bound: int) -> None:
    id_, at = uuid7.IdGenerator(lambda: us * 1000).new() if us else uuid7.IdGenerator(lambda: 1000).new()
    assert (id_ >= uuid7.lowest(bound)) == (at >= bound)


def test_times_outside_the_range_of_ids_are_bounds_too() -> None:
    id_, _ = uuid7.IdGenerator().new()
    assert uuid7.lowest(-(10**18)) < id_ < uuid7.lowest(10**18)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "0" * 32,
        "urn:uuid:" + "0" * 36,
        "{00000000-0000-7000-8000-000000000000}",
        "00000000-0000-7000-8000-00000000000g",
        "00000000-0000-7000-8000-000000000000\n",
        "\u06600000000-0000-7000-8000-000000000000",
    ],
)
def test_a_malformed_id_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        uuid7.parse(value)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_a_page_token_decodes_to_its_id(last: bytes, digest: bytes) -> None:
    token = page_tokens.encode(KEYS, last, digest)
    assert page_tokens.decode(KEYS, token, digest) == last
    with pytest.raises(errors.InvalidArgument):
        page_tokens.decode(KEYS, token, bytes(16) if digest != bytes(16) else b"x" * 16)


def test_the_empty_token_is_the_first_page() -> None:
    assert page_tokens.decode(KEYS, "", b"d") is None


@given(st.text(max_size=60))
def test_any_other_text_is_refused(text: str) -> None:
    if text:
        with pytest.raises(errors.InvalidArgument) as caught:
            page_tokens.decode(KEYS, text, b"d" * 16)
        assert caught.value.violations[0].field == "page_token"


def test_a_changed_token_is_refused() -> None:
    digest = b"d" * 16
    token = page_tokens.encode(KEYS, bytes(range(16)), digest)
    raw = base64.urlsafe_b64decode(token + "==="[: -len(token) % 4])
    others = [token + "=", token + " ", token[:-1], token.lower(), token + token]
    others += [
        base64.urlsafe_b64encode(raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :]).decode().rstrip("=")
        for n in range(len(raw))
    ]
    for other in others:
        with pytest.raises(errors.InvalidArgument):
            page_tokens.decode(KEYS, other, digest)


def test_a_page_has_50_tasks_by_default_and_1000_at_most() -> None:
    assert [page_tokens.page_size(n) for n in (0, 1, 50, 1000, 1001, 2**31 - 1)] == [
        50,
        1,
        50,
        1000,
        1000,
        1000,
    ]
    for bad in (-1, -(2**31)):
        with pytest.raises(errors.InvalidArgument):
            page_tokens.page_size(bad)
