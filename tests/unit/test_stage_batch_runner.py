"""Batch handlers: one batch at a time, for ever until it is handled, without what was given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy.exc import DataError, OperationalError

from services.common.stage.batch_runner import BatchRunner
from services.common.stage.handler_runner import _dead_by_error
from services.common.stage.partition_tracker import Assignment, InFlightRecord
from services.common.stage.types import BatchHandler, Done, Outcome, Record


class Rig:
    """A BatchRunner with what came out of it."""

    def __init__(self, handle: BatchHandler, most: int = 500) -> None:
        self.settled: list[int] = []
        self.abandoned: list[int] = []
        self.batches = BatchRunner(
            handle,
            lambda settled: self.settled.extend(record.offset for record, _ in settled),
            lambda records: self.abandoned.extend(record.offset for record in records),
            lambda seconds: None,
            most,
        )


def records(*offsets: int, assignment: Assignment | None = None) -> list[InFlightRecord]:
    owner = assignment or Assignment("t", 0)
    return [
        InFlightRecord(assignment=owner, offset=o, topic="t", key=b"", value=b"", headers=None)
        for o in offsets
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0)


async def test_a_problem_with_the_database_is_told_without_the_statement() -> None:
    tries = 0

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OperationalError("INSERT " * 7000, None, Exception("gone"))
        return [Done()] * len(batch)

    rig = Rig(handle)
    rig.batches.put(records(0))
    await until(lambda: bool(rig.batches.problems()))
    assert [problem.endswith("OperationalError: gone") for problem in rig.batches.problems()] == [True]
    await until(lambda: rig.settled == [0])


async def test_what_arrives_while_one_runs_makes_the_next_batch() -> None:
    sizes: list[int] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        sizes.append(len(batch))
        await go.wait()
        return [Done()] * len(batch)

    rig = Rig(handle, most=4)
    rig.batches.put(records(0))
    await until(lambda: sizes == [1])
    for offset in range(1, 8):
        rig.batches.put(records(offset))
    go.set()
    await until(lambda: len(rig.settled) == 8)
    assert sizes == [1, 4, 3]
    assert rig.settled == list(range(8))


@pytest.mark.parametrize("trouble", ["raises", "cancels itself", "answers too few"])
async def test_i2_a_batch_is_handled_again_until_it_is_handled(trouble: str) -> None:
    tries = 0

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        nonlocal tries
        tries += 1
        if tries > 2:
            return [Done()] * len(batch)
        if trouble == "raises":
            raise ConnectionError("gone")
        if trouble == "cancels itself":
            raise asyncio.CancelledError
        return [Done()]

    rig = Rig(handle)
    rig.batches.put(records(0, 1, 2))
    await until(lambda: tries == 1 and bool(rig.batches.problems()))
    assert rig.settled == []
    await until(lambda: rig.settled == [0, 1, 2])
    assert rig.batches.problems() == []
    assert rig.abandoned == []


async def test_i8_what_is_given_up_is_stopped_and_the_rest_is_handled_anew() -> None:
    seen: list[list[int]] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        seen.append([record.offset for record in batch])  # type: ignore[attr-defined]
        await go.wait()
        return [Done()] * len(batch)

    staying, leaving = Assignment("t", 0), Assignment("t", 1)
    rig = Rig(handle, most=4)
    first = [*records(0, 1, assignment=staying), *records(10, 11, assignment=leaving)]
    rig.batches.put(first)
    await until(lambda: len(seen) == 1)
    rig.batches.put([*records(2, assignment=staying), *records(12, assignment=leaving)])
    rig.batches.cancel(lambda record: record.assignment is leaving)
    go.set()
    await until(lambda: rig.settled == [0, 1, 2])
    assert seen == [[0, 1, 10, 11], [0, 1], [2]]
    assert sorted(rig.abandoned) == [10, 11, 12]


async def test_i2_an_outcome_that_comes_in_spite_of_being_given_up_settles_nothing() -> None:
    started = asyncio.Event()

    async def stubborn(batch: Sequence[Record]) -> Sequence[Outcome]:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return [Done()] * len(batch)
        return []

    rig = Rig(stubborn)
    rig.batches.put(records(0, 1))
    await started.wait()
    rig.batches.cancel(lambda _: True)
    await until(lambda: rig.abandoned == [0, 1])
    for _ in range(10):
        await asyncio.sleep(0)
    assert rig.settled == []


def test_a_dead_letters_cause_says_what_the_database_said_without_the_statement() -> None:
    [record] = records(0)
    error = DataError("INSERT " * 7000, None, Exception("too long"))
    assert _dead_by_error(record, error).cause == "DataError: too long"
