"""HandlerRunner with a handler that gets all records at once: what it finishes is published, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.events import DECODERS
from services.common.kafka.publisher import PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.stage.handler_runner import HandlerRunner
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.outcome_encoder import OutcomeEncoder
from services.common.stage.types import Done, Finish, Record, Stage

EVENT = pb.TaskCreated(task=pb.MailTask(id=bytes(16)))


class Handler:
    """Keeps what it was given; the test finishes it."""

    def __init__(self) -> None:
        self.started: list[list[Record]] = []
        self.cancelled: list[Record] = []

    def start(self, records: Sequence[Record], finish: Finish) -> None:
        self.started.append(list(records))
        self.finish = finish

    def cancel(self, records: Sequence[Record]) -> None:
        self.cancelled += records


class Rig:
    """A runner, its handler, and the batches that it published."""

    def __init__(self) -> None:
        self.handler = Handler()
        self.batches: list[list[OutgoingRecord]] = []
        self.acks: list[Callable[[list[PublishFailure]], None]] = []
        self.released: list[InFlightRecord] = []
        stage = Stage("sender", ["task.created"], DECODERS, handle_all=self.handler)
        encoder = OutcomeEncoder(stage, "sender")
        self.runner = HandlerRunner(stage, encoder, self, self.released.extend)  # type: ignore[arg-type]

    def send(self, batch: Sequence[OutgoingRecord], on_done: Any) -> None:
        self.batches.append(list(batch))
        self.acks.append(on_done)


def records(*offsets: int, undecodable: str | None = None) -> list[InFlightRecord]:
    owner = Assignment("task.created", 0)
    return [
        InFlightRecord(
            assignment=owner,
            offset=offset,
            topic="task.created",
            key=b"k",
            value=b"v",
            headers=None,
            undecodable=undecodable,
        )
        for offset in offsets
    ]


async def test_the_handler_gets_a_batch_whole_without_what_cannot_be_decoded() -> None:
    rig = Rig()
    sound, broken = records(1, 2), records(3, undecodable="no")
    rig.runner.start([*sound, *broken])
    assert rig.handler.started == [sound]
    [[dead]] = rig.batches
    assert dead.topic == "sender.dead"


async def test_outcomes_of_one_turn_are_published_together_and_finished_once_acked() -> None:
    rig = Rig()
    first, second, third = batch = records(1, 2, 3)
    rig.runner.start(batch)
    rig.handler.finish([(third, Done([EVENT]))])
    rig.handler.finish([(first, Done([EVENT]))])
    assert rig.batches == []
    await asyncio.sleep(0)
    assert [len(batch) for batch in rig.batches] == [2]
    assert rig.released == []
    rig.acks[0]([])
    assert rig.released == [third, first]
    assert [record.finished for record in batch] == [True, False, True]
    rig.handler.finish([(second, Done())])
    await asyncio.sleep(0)
    assert second.finished


async def test_a_second_outcome_of_a_record_changes_nothing() -> None:
    rig = Rig()
    [record] = records(1)
    rig.runner.start([record])
    rig.handler.finish([(record, Done([EVENT]))])
    rig.handler.finish([(record, Done([EVENT]))])
    await asyncio.sleep(0)
    assert [len(batch) for batch in rig.batches] == [1]


async def test_a_cancelled_record_is_released_unfinished_whatever_its_handler_says_later() -> None:
    rig = Rig()
    stays, goes = records(1)[0], records(2)[0]
    rig.runner.start([stays, goes])
    rig.runner.cancel([goes.assignment])
    assert rig.handler.cancelled == rig.released == [goes]
    rig.handler.finish([(goes, Done([EVENT]))])
    await asyncio.sleep(0)
    assert rig.batches == []
    assert not goes.finished
    rig.runner.cancel(None)
    assert rig.handler.cancelled == [goes, stays]


async def test_an_exception_makes_the_record_a_dead_letter() -> None:
    rig = Rig()
    [record] = records(1)
    rig.runner.start([record])
    rig.handler.finish([(record, RuntimeError("a bug"))])
    await asyncio.sleep(0)
    [[dead]] = rig.batches
    assert (dead.topic, dict(dead.headers)["cause"]) == ("sender.dead", b"RuntimeError: a bug")


async def test_a_stage_has_one_handler() -> None:
    stage = Stage("sender", [], DECODERS, handle=lambda record: Done(), handle_all=Handler())
    with pytest.raises(ValueError, match="one of handle, handle_batch and handle_all"):
        HandlerRunner(stage, OutcomeEncoder(stage, "sender"), Rig(), lambda records: None)  # type: ignore[arg-type]
