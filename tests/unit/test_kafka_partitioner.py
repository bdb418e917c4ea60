"""The partition of a key is the one of Kafka's own clients, and keys of a chosen partition can be made."""

from __future__ import annotations

import os
import random

import pytest

from services.common.kafka.partitioner import complete_key, partition_of


@pytest.mark.parametrize(
    ("key", "murmur2"),
    [
        # Apache Kafka, UtilsTest.testMurmur2.
        (b"a-little-bit-long-string", -985981536),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    ],
)
def test_the_hash_is_that_of_the_java_client(key: bytes, murmur2: int) -> None:
    assert partition_of(key, 1 << 31) == murmur2 & 0x7FFFFFFF


@pytest.mark.parametrize("partitions", [1, 2, 7, 12, 100_000])
def test_a_key_is_made_for_each_partition(partitions: int) -> None:
    for partition in {0, 1, partitions // 2, partitions - 1} & set(range(partitions)):
        for bits in (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, random.getrandbits(32)):
            head = os.urandom(12)
            key = complete_key(head, partition, partitions, bits)
            assert len(key) == 16
            assert key.startswith(head)
            assert partition_of(key, partitions) == partition


def test_keys_of_one_partition_have_no_pattern() -> None:
    head = os.urandom(12)
    tails = {complete_key(head, 5, 12, random.getrandbits(32))[12:] for _ in range(2000)}
    assert len(tails) > 1990
    for byte in range(4):
        assert len({tail[byte] for tail in tails}) > 240
