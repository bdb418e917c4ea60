"""Records that no service wrote become dead letters with their cause, and the stage continues."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from services.common.kafka import topics
from services.common.stages import STAGES
from tests.e2e.pipeline import Pipeline, until
from tests.stack import Stack

BAD = {"garbage": b"\xff\xfe no protobuf \x00", "empty": b"", "none": None}
TRACE = [("traceparent", b"00-1-2-00")]
# Far larger than a task can be, as large as a topic takes.
OVERSIZED = {"oversized": b"\xff" * (topics.MAX_RECORD_BYTES - 100_000)}


@pytest.fixture
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


def _header(record: Any, name: str) -> str:
    return next(value.decode() for key, value in record.headers() or [] if key == name)


@pytest.mark.timeout(600)
def test_bad_records_on_every_topic(pipeline: Pipeline, stack: Stack) -> None:
    run = str(time.time_ns())
    # The first topic of each stage alone gets the large ones.
    large = {stage.reads[0] for stage in STAGES.values()}
    bad = {topic: BAD | (OVERSIZED if topic in large else {}) for topic in topics.EVENT_TOPICS}
    producer = Producer(
        {
            **stack.kafka,
            "message.max.bytes": topics.MAX_RECORD_BYTES,
        }
    )
    for topic, values in bad.items():
        for mark, value in values.items():
            key = f"{run}-{topic}-{mark}"
            producer.produce(
                stack.names.topic(topic), value, key=key, headers=[("traceparent", b"00-1-2-00")]
            )
    assert producer.flush(60) == 0
    # A record that is committed has its dead letter.
    until(lambda: not any(pipeline.lag().values()), "all committed")

    for name, stage in STAGES.items():
        found = [r for r in pipeline.records(f"{name}.dead") if (r.key() or b"").startswith(run.encode())]
        wanted = [f"{run}-{topic}-{mark}" for topic in stage.reads for mark in bad[topic]]
        assert sorted(r.key().decode() for r in found) == sorted(wanted)
        for dead_letter in found:
            _, topic, mark = dead_letter.key().decode().split("-")
            assert (dead_letter.value() or b"") == (bad[topic][mark] or b"")
            assert _header(dead_letter, "origin").startswith(f"{topic}/")
            assert _header(dead_letter, "cause")
            assert _header(dead_letter, "traceparent") == "00-1-2-00"

    after = [pipeline.create(f"after{n}@d{n}.ok.test") for n in range(12)]
    assert {task.status for task in pipeline.settled(after).values()} == {"completed"}
    until(lambda: not any(pipeline.lag().values()), "no stage is stuck")
