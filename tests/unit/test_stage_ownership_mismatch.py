"""When a member and its coordinator are found to disagree for good."""

from __future__ import annotations

from services.common.stage.membership import OwnershipMismatch

A, B, C = ("task.created", 0), ("task.created", 1), ("task.created", 2)


def test_what_both_see_alike_is_never_broken() -> None:
    mismatch = OwnershipMismatch(10)
    assert not any(mismatch.lasts([A, B], [B, A], now) for now in range(0, 100, 5))


def test_a_difference_that_stays_breaks_it_in_either_direction() -> None:
    for owned, told in (([A], [A, B]), ([A, B], [A]), ([], [A])):
        mismatch = OwnershipMismatch(10)
        looks = [mismatch.lasts(owned, told, now) for now in (100, 105, 109.9, 110)]
        assert looks == [False, False, False, True]


def test_a_difference_that_changes_is_a_change_of_the_group_under_way() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    assert not mismatch.lasts([A], [A, C], 9)
    assert not mismatch.lasts([A], [A, C], 14)
    assert mismatch.lasts([A], [A, C], 19)


def test_agreeing_once_ends_it() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    assert not mismatch.lasts([A, B], [A, B], 9)
    assert not mismatch.lasts([A], [A, B], 12)
    assert not mismatch.lasts([A], [A, B], 21)
    assert mismatch.lasts([A], [A, B], 22)


def test_two_looks_far_apart_are_not_one_long_look() -> None:
    mismatch = OwnershipMismatch(10)
    assert not mismatch.lasts([A], [A, B], 0)
    assert not mismatch.lasts([A], [A, B], 60)
    assert not mismatch.lasts([A], [A, B], 65)
    assert mismatch.lasts([A], [A, B], 70)
