"""Records that no service wrote become dead letters with their cause, and the stage continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from services.common.kafka import topics
from services.common.stages import STAGES
from tests.e2e.pipeline import Pipeline, until
from tests.stack import Stack

# Far larger than a task can be, as large as a topic takes.
OVERSIZED = b"\xff" * (topics.MAX_RECORD_BYTES - 100_000)
BAD = {"garbage": b"\xff\xfe no protobuf \x00", "empty": b"", "none": None, "oversized": OVERSIZED}


@pytest.fixture
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


def _header(record: Any, name: str) -> str:
    return next(value.decode() for key, value in record.headers() or [] if key == name)


@pytest.mark.timeout(600)
def test_bad_records_on_every_topic(pipeline: Pipeline, stack: Stack) -> None:
    readers = {name: list(stage.reads) for name, stage in STAGES.items()}
    before = {stage: len(pipeline.records(f"{stage}.dead")) for stage in readers}
    producer = Producer(
        {
            "bootstrap.servers": stack.env()["POSTROAD_KAFKA_BOOTSTRAP"],
            "message.max.bytes": topics.MAX_RECORD_BYTES,
        }
    )
    for topic in topics.EVENT_TOPICS:
        for mark, value in BAD.items():
            producer.produce(topic, value, key=f"bad-{topic}-{mark}", headers=[("traceparent", b"00-1-2-00")])
    assert producer.flush(60) == 0

    for stage, reads in readers.items():
        wanted = {f"bad-{topic}-{mark}".encode() for topic in reads for mark in BAD}

        def dead(stage: str = stage, wanted: set[bytes] = wanted) -> list[Any]:
            found = [r for r in pipeline.records(f"{stage}.dead")[before[stage] :] if r.key() in wanted]
            return found if len(found) >= len(wanted) else []

        found = until(dead, f"{stage}'s dead letters", 90)
        assert len(found) == len(wanted), "a dead letter came twice"
        for dead_letter in found:
            _, topic, mark = dead_letter.key().decode().split("-")
            assert (dead_letter.value() or b"") == (BAD[mark] or b"")
            assert _header(dead_letter, "origin").startswith(f"{topic}/")
            assert _header(dead_letter, "cause")
            assert _header(dead_letter, "traceparent") == "00-1-2-00"

    after = [pipeline.create(f"after{n}@d{n}.ok.test") for n in range(24)]
    assert {task.status for task in pipeline.settled(after).values()} == {"completed"}
    until(lambda: not any(pipeline.lag().values()), "no stage is stuck", 30)
