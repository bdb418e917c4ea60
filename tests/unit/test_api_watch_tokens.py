"""Resume tokens of Watch, and the merge of partitions, whose offsets they contain."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.errors import InvalidArgument
from services.api.token_keys import MAC_LENGTH, TokenKeys
from services.api.watch import resume_tokens
from services.api.watch.applied_changes import AppliedChange
from services.api.watch.catch_up import TOKEN_INTERVAL, token_groups
from services.api.watch.partition_merge import PartitionMerge
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS
from tests.watch_changes import life, mail, read

# --- tokens ------------------------------------------------------------------------------------

KEYS = TokenKeys([b"k" * 32])
POSITIONS = st.dictionaries(
    st.tuples(st.sampled_from(EVENT_TOPICS), st.integers(0, 40)), st.integers(0, (1 << 63) - 1), max_size=40
)


@given(POSITIONS, st.binary(min_size=16, max_size=16))
def test_a_token_decodes_to_its_positions(positions: dict[TopicPartition, int], digest: bytes) -> None:
    token = resume_tokens.token(KEYS, digest, resume_tokens.encode_positions(positions))
    found = resume_tokens.decode(KEYS, token, digest)
    assert {partition: offset for partition, offset in found.items() if offset} == {
        partition: offset for partition, offset in positions.items() if offset
    }
    assert found.keys() >= positions.keys()


@given(POSITIONS, st.data())
def test_a_changed_token_is_refused(positions: dict[TopicPartition, int], data: st.DataObject) -> None:
    good = resume_tokens.token(KEYS, b"me", resume_tokens.encode_positions(positions))
    assert resume_tokens.decode(KEYS, good, b"me") is not None
    at = data.draw(st.integers(0, len(good) - 1))
    character = data.draw(st.sampled_from([c for c in "AZaz09-_~é\0" if c != good[at]]))
    for bad in (good[:at], good[:at] + character + good[at + 1 :], good + character):
        with pytest.raises(InvalidArgument):
            resume_tokens.decode(KEYS, bad, b"me")
    with pytest.raises(InvalidArgument):
        resume_tokens.decode(KEYS, good, b"you")


@given(st.text(max_size=200))
def test_any_other_text_is_refused(text: str) -> None:
    for bad in (text, "A" * MAC_LENGTH + text):
        with pytest.raises(InvalidArgument):
            resume_tokens.decode(KEYS, bad, b"me")


# --- merging partitions ------------------------------------------------------------------------


@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_partitions_are_merged_by_time_however_fast_each_is_read(chance: random.Random, count: int) -> None:
    partitions = [TopicPartition(EVENT_TOPICS[0], number) for number in range(count)]
    event = life(mail())[0]
    left = {
        partition: [
            read(event)._replace(partition=partition, offset=o, at_ms=at) for o, at in enumerate(times)
        ]
        for partition in partitions
        if (times := sorted(chance.randint(0, 9) for _ in range(chance.randint(0, 8)))) is not None
    }
    everything = [c for changes in left.values() for c in changes]
    merge, released = PartitionMerge(partitions, max_kept=6), []
    for partition in [partition for partition in partitions if not left[partition]]:
        merge.end(partition)
        del left[partition]
    while left:
        open_ = [partition for partition in sorted(left) if partition not in merge.ahead()]
        assert open_, "a merge that pauses every partition never ends"
        partition = chance.choice(open_)
        merge.add(left[partition].pop(0))
        if not left[partition]:
            merge.end(partition)
            del left[partition]
        released += merge.release()
        waiting = [c for c in everything if c not in released]
        for partition, offset in merge.first_offsets().items():
            assert offset == min(c.offset for c in waiting if c.partition == partition)
        assert len(everything) - len(released) - sum(map(len, left.values())) <= 6 + count
    assert [c.at_ms for c in released] == sorted(c.at_ms for c in everything)
    for partition in partitions:
        assert [c.offset for c in released if c.partition == partition] == list(
            range(sum(c.partition == partition for c in released))
        )


def test_a_partition_whose_times_step_back_keeps_its_order() -> None:
    one, other = TopicPartition(EVENT_TOPICS[0], 0), TopicPartition(EVENT_TOPICS[0], 1)
    blank = read(life(mail())[0])
    merge = PartitionMerge([one, other])
    for partition, offset, at in ((one, 0, 5), (one, 1, 3), (other, 0, 4)):
        merge.add(blank._replace(partition=partition, offset=offset, at_ms=at))
    merge.end(one)
    merge.end(other)
    assert [(c.partition.partition, c.offset) for c in merge.release()] == [(1, 0), (0, 0), (0, 1)]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=150))
def test_a_token_between_two_groups_skips_no_later_change(locations: list[tuple[int, int]]) -> None:
    blank = read(life(mail())[0])
    changes = [
        AppliedChange(
            blank._replace(partition=TopicPartition(EVENT_TOPICS[0], number), offset=offset), blank.row
        )
        for number, offset in locations
    ]
    sent = 0
    for group, left in token_groups(changes):
        assert 0 < len(group) <= TOKEN_INTERVAL
        assert group == changes[sent : sent + len(group)]
        sent += len(group)
        rest = [applied.change for applied in changes[sent:]]
        assert left == {c.partition: min(d.offset for d in rest if d.partition == c.partition) for c in rest}
    assert sent == len(changes)
