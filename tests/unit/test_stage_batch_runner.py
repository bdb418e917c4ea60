"""BatchRunner: one batch at a time, again until the handler succeeds, without the abandoned records."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from sqlalchemy.exc import DataError, OperationalError

from services.common.stage.batch_runner import BatchRunner
from services.common.stage.handler_runner import _dead_by_error
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.types import BatchHandler, Done, Outcome, Record


class Rig:
    """A BatchRunner, and the offsets that it passed on: handled or abandoned."""

    def __init__(self, handle: BatchHandler, most: int = 500) -> None:
        self.handled: list[int] = []
        self.abandoned: list[int] = []
        self.runner = BatchRunner(
            handle,
            lambda outcomes: self.handled.extend(record.offset for record, _ in outcomes),
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
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a state, not an event
            await asyncio.sleep(0)


async def test_a_problem_names_the_database_error_without_its_statement() -> None:
    tries = 0

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OperationalError("INSERT " * 7000, None, Exception("gone"))
        return [Done()] * len(batch)

    rig = Rig(handle)
    rig.runner.put(records(0))
    await until(lambda: bool(rig.runner.problems()))
    assert [problem.endswith("OperationalError: gone") for problem in rig.runner.problems()] == [True]
    await until(lambda: rig.handled == [0])


async def test_records_that_arrive_during_a_batch_form_the_next_one() -> None:
    sizes: list[int] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        sizes.append(len(batch))
        await go.wait()
        return [Done()] * len(batch)

    rig = Rig(handle, most=4)
    rig.runner.put(records(0))
    await until(lambda: sizes == [1])
    for offset in range(1, 8):
        rig.runner.put(records(offset))
    go.set()
    await until(lambda: len(rig.handled) == 8)
    assert sizes == [1, 4, 3]
    assert rig.handled == list(range(8))


@pytest.mark.parametrize("trouble", ["raises", "cancels itself", "returns too few"])
async def test_i2_a_failed_batch_is_handled_again_until_it_succeeds(trouble: str) -> None:
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
    rig.runner.put(records(0, 1, 2))
    await until(lambda: tries == 1 and bool(rig.runner.problems()))
    assert rig.handled == []
    await until(lambda: rig.handled == [0, 1, 2])
    assert rig.runner.problems() == []
    assert rig.abandoned == []


async def test_i8_a_batch_with_abandoned_records_is_stopped_and_the_rest_is_handled_anew() -> None:
    seen: list[list[int]] = []
    go = asyncio.Event()

    async def handle(batch: Sequence[Record]) -> Sequence[Outcome]:
        seen.append([record.offset for record in batch])  # type: ignore[attr-defined]
        await go.wait()
        return [Done()] * len(batch)

    staying, leaving = Assignment("t", 0), Assignment("t", 1)
    rig = Rig(handle, most=4)
    first = [*records(0, 1, assignment=staying), *records(10, 11, assignment=leaving)]
    rig.runner.put(first)
    await until(lambda: len(seen) == 1)
    rig.runner.put([*records(2, assignment=staying), *records(12, assignment=leaving)])
    rig.runner.cancel(lambda record: record.assignment is leaving)
    go.set()
    await until(lambda: rig.handled == [0, 1, 2])
    assert seen == [[0, 1, 10, 11], [0, 1], [2]]
    assert sorted(rig.abandoned) == [10, 11, 12]


async def test_i2_outcomes_of_abandoned_records_finish_nothing() -> None:
    started = asyncio.Event()

    async def stubborn(batch: Sequence[Record]) -> Sequence[Outcome]:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return [Done()] * len(batch)
        return []

    rig = Rig(stubborn)
    rig.runner.put(records(0, 1))
    await started.wait()
    rig.runner.cancel(lambda _: True)
    await until(lambda: rig.abandoned == [0, 1])
    for _ in range(10):
        await asyncio.sleep(0)
    assert rig.handled == []


def test_a_dead_letters_cause_has_the_database_error_without_its_statement() -> None:
    [record] = records(0)
    error = DataError("INSERT " * 7000, None, Exception("too long"))
    assert _dead_by_error(record, error).cause == "DataError: too long"
