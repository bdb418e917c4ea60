"""The headers of delayed records and dead letters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.kafka.headers import (
    dead_letter_headers,
    delayed_headers,
    original_headers,
    parse_delayed_headers,
    parse_origin,
)
from services.common.kafka.records import MalformedHeaders, traceparent
from services.common.kafka.topic_partition import RecordLocation

ORIGINAL = [("ce_id", b"1"), ("ce_type", b"t"), ("traceparent", b"00-a-b-01")]
ORIGIN = RecordLocation("task.created", 3, 1234)
OURS = ["due-at", "attempt", "origin", "cause", "ce_id", "traceparent"]
NAMES = st.sampled_from(OURS) | st.text(max_size=5)


@given(
    st.integers(1, 10**6), st.integers(0, 10**14), st.integers(0, 10**4), st.integers(0, 10**15), st.text()
)
def test_written_headers_are_read_back(
    attempt: int, due: int, partition: int, offset: int, cause: str
) -> None:
    origin = RecordLocation("sender.x/y", partition, offset)
    headers = delayed_headers(ORIGINAL, origin=origin, attempt=attempt, cause=cause, due_at_ms=due)
    parsed = parse_delayed_headers(headers)
    assert (parsed.due_at_ms, parsed.attempt, parsed.origin) == (due, attempt, origin)
    assert headers[:3] == ORIGINAL
    assert traceparent(headers) == b"00-a-b-01"


def test_a_second_delay_replaces_the_headers_of_the_first() -> None:
    first = delayed_headers(ORIGINAL, origin=ORIGIN, attempt=2, cause="a", due_at_ms=1)
    second = delayed_headers(first, origin=ORIGIN, attempt=3, cause="b", due_at_ms=2)
    assert [name for name, _ in second].count("attempt") == 1
    assert dict(second)["cause"] == b"b"
    dead_letter = dict(dead_letter_headers(second, origin=ORIGIN, attempt=3, cause="c"))
    assert dead_letter == dict(ORIGINAL) | {"attempt": b"3", "origin": b"task.created/3/1234", "cause": b"c"}


@given(st.lists(st.tuples(NAMES, st.none() | st.binary(max_size=30)), max_size=8) | st.none())
def test_garbage_raises_malformed_headers_and_nothing_else(headers: list[tuple[str, bytes]] | None) -> None:
    traceparent(headers)
    try:
        parsed = parse_delayed_headers(headers)
    except MalformedHeaders:
        return
    assert parsed.attempt >= 1
    assert parsed.due_at_ms >= 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("due-at", b"-1"), ("due-at", b""), ("due-at", b"9" * 30), ("attempt", b"0"), ("attempt", b"1_0"),
     ("origin", b"a/1"), ("origin", b"/1/2"), ("origin", b"a/b/2"), ("origin", "é/1/2".encode())],
)  # fmt: skip
def test_each_bad_header_is_named(name: str, value: bytes) -> None:
    good = dict(delayed_headers(None, origin=ORIGIN, attempt=2, cause="", due_at_ms=5))
    with pytest.raises(MalformedHeaders, match=name):
        parse_delayed_headers(list({**good, name: value}.items()))
    del good[name]
    with pytest.raises(MalformedHeaders, match=name):
        parse_delayed_headers(list(good.items()))


@pytest.mark.parametrize(
    "origin",
    [b"t" * 250 + b"/0/0", b"t/" + b"1" * 20 + b"/0", b"t/0/" + b"1" * 5000, b"t/0/9223372036854775808"],
)
def test_an_origin_is_at_most_a_topic_name_and_two_numbers(origin: bytes) -> None:
    with pytest.raises(MalformedHeaders, match="origin"):
        parse_origin([("origin", origin)])


def test_a_long_cause_is_cut() -> None:
    headers = dict(dead_letter_headers(None, origin=ORIGIN, attempt=1, cause="x" * 100_000))
    assert len(headers["cause"]) <= 2000


@pytest.mark.parametrize("name", ["due-at", "attempt", "origin", "cause", "resolves", "resolution"])
def test_headers_of_our_names_in_a_foreign_record_are_dropped(name: str) -> None:
    foreign = [(name, b"0-99"), *ORIGINAL]
    dead_letter = dead_letter_headers(foreign, origin=ORIGIN, attempt=1, cause="c")
    assert dead_letter == [*ORIGINAL, ("attempt", b"1"), ("origin", b"task.created/3/1234"), ("cause", b"c")]
    delayed = delayed_headers(foreign, origin=ORIGIN, attempt=2, cause="c", due_at_ms=5)
    assert (name, b"0-99") not in delayed
    assert original_headers(foreign) == ORIGINAL


def test_a_replay_id_is_kept_where_a_replay_can_have_written_it() -> None:
    replayed = [("replay-id", b"r"), *ORIGINAL]
    assert dead_letter_headers(replayed, origin=ORIGIN, attempt=1, cause="c")[0] == ("replay-id", b"r")
    assert "replay-id" not in dict(
        dead_letter_headers(replayed, origin=ORIGIN, attempt=1, cause="c", foreign=True)
    )
