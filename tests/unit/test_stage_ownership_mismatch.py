"""OwnershipMismatch: when the partitions that a member owns differ for good from those assigned to it."""

from __future__ import annotations

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.membership import OwnershipMismatch

A, B, C = (TopicPartition("task.created", number) for number in range(3))


def test_equal_partitions_are_no_mismatch() -> None:
    mismatch = OwnershipMismatch(10)
    assert not any(mismatch.lasts([A, B], [B, A], now) for now in range(0, 100, 5))


def test_a_difference_that_stays_is_a_mismatch_in_either_direction() -> None:
    for owned, assigned in (([A], [A, B]), ([A, B], [A]), ([], [A])):
        mismatch = OwnershipMismatch(10)
        results = [mismatch.lasts(owned, assigned, now) for now in (100, 105, 109.9, 110)]
        assert results == [False, False, False, True]


def test_a_difference_that_changes_is_a_rebalance_under_way() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    assert not mismatch.lasts([A], [A, C], 9)
    assert not mismatch.lasts([A], [A, C], 14)
    assert mismatch.lasts([A], [A, C], 19)


def test_one_agreement_ends_a_mismatch() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    assert not mismatch.lasts([A, B], [A, B], 9)
    assert not mismatch.lasts([A], [A, B], 12)
    assert not mismatch.lasts([A], [A, B], 21)
    assert mismatch.lasts([A], [A, B], 22)


def test_responses_may_come_further_apart_than_the_grace() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    for now in range(26):
        mismatch.check(now)
    assert mismatch.lasts([A], [A, B], 25)


def test_a_poller_that_was_held_up_starts_anew() -> None:
    mismatch = OwnershipMismatch(10)
    mismatch.check(0)
    assert not mismatch.lasts([A], [A, B], 0)
    mismatch.check(60)
    assert not mismatch.lasts([A], [A, B], 60)
    mismatch.check(65)
    assert not mismatch.lasts([A], [A, B], 65)
    mismatch.check(70)
    assert mismatch.lasts([A], [A, B], 70)
