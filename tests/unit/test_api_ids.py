"""Task ids and page tokens."""

from __future__ import annotations

import base64
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api import errors, page_tokens, uuid7
from services.api.token_keys import TokenKeys
from services.common.kafka.partitioner import partition_of

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


@pytest.mark.parametrize("partitions", [1, 2, 7, 12])
def test_a_batch_of_ids_is_one_partitions_and_batches_take_turns(partitions: int) -> None:
    generator = uuid7.IdGenerator(lambda: 5_000_000, partitions)
    batches = [generator.batch(20) for _ in range(2 * partitions)]
    made = [each for batch in batches for each in batch]
    assert sorted(set(made)) == made
    assert [us for _, us in made] == list(range(5000, 5000 + len(made)))
    used = [{partition_of(id_, partitions) for id_, _ in batch} for batch in batches]
    assert [len(of_batch) for of_batch in used] == [1] * len(batches)
    assert sorted(min(of_batch) for of_batch in used) == sorted([*range(partitions)] * 2)
    assert {uuid.UUID(bytes=id_).version for id_, _ in made} == {7}


def test_neighbours_do_not_follow_each_other() -> None:
    """A stage's replica owns a range of partitions, and batch after batch would go to one replica."""
    generator = uuid7.IdGenerator(partitions=12)
    replicas = [partition_of(generator.batch(1)[0][0], 12) // 4 for _ in range(12)]
    assert max(replicas.count(replica) for replica in range(3)) == 4
    assert all(len(set(replicas[n : n + 3])) > 1 for n in range(10))


def test_single_ids_of_one_moment_share_a_partition() -> None:
    times = iter(range(10**9, 2 * 10**9, 1_000_000))
    generator = uuid7.IdGenerator(lambda: next(times), partitions=12)
    used = [partition_of(generator.new()[0], 12) for _ in range(600)]
    moments = [used[n : n + 50] for n in range(0, 600, 50)]
    assert [len(set(moment)) for moment in moments] == [1] * 12
    assert len({moment[0] for moment in moments}) == 12


def test_a_batch_does_not_end_the_partition_of_single_ids() -> None:
    generator = uuid7.IdGenerator(lambda: 5_000_000, partitions=12)
    used = set()
    for _ in range(12):
        generator.batch(3)
        used.add(partition_of(generator.new()[0], 12))
    assert len(used) == 1


def test_ids_of_one_partition_are_random() -> None:
    generator = uuid7.IdGenerator(lambda: 5_000_000, partitions=12)
    tails = [int.from_bytes(id_[8:]) for id_, _ in generator.batch(5000)]
    assert len(set(tails)) == len(tails)
    for bit in range(62):
        assert 0.4 < sum(tail >> bit & 1 for tail in tails) / len(tails) < 0.6


def test_the_first_partition_differs_between_replicas() -> None:
    first = {partition_of(uuid7.IdGenerator(partitions=12).new()[0], 12) for _ in range(100)}
    assert len(first) > 6


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
