"""The operations' producer reports a record that Kafka refuses for good, and produces all others."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from services.common.config import Settings
from services.common.kafka.clients import producer_config
from services.common.operations import record_producer
from services.common.operations.record_producer import RecordProducer
from tests.librdkafka import library, mock_cluster

PRODUCE = 0
TOO_LARGE, NO_ERROR, UNKNOWN_SERVER_ERROR = 10, 0, -1
TOPIC = "task.created"
Refusals = list[tuple[int, KafkaError]]


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordProducer]:
    """A producer on librdkafka's mock cluster, with its topic."""

    def config(settings: Settings, client_id: str) -> dict[str, Any]:
        return producer_config(settings, client_id) | {"test.mock.num.brokers": 1}

    monkeypatch.setattr(record_producer, "producer_config", config)
    monkeypatch.setattr(record_producer, "MAX_RECORD_SIZE", 1 << 20)
    made = RecordProducer(Settings(kafka_bootstrap="127.0.0.1:1"))
    assert library().rd_kafka_mock_topic_create(mock_cluster(made._producer), TOPIC.encode(), 1, 1) == 0
    yield made
    made._producer.purge()


def answer_next(producer: RecordProducer, *errors: int) -> None:
    """Have the broker answer the next Produce requests with these errors."""
    codes = [ctypes.c_int(error) for error in errors]
    library().rd_kafka_mock_push_request_errors(
        mock_cluster(producer._producer), ctypes.c_int16(PRODUCE), ctypes.c_size_t(len(codes)), *codes
    )


def put(producer: RecordProducer, *numbers: int) -> Refusals:
    """Put records. Returns the list that gets their refusals."""
    refusals: Refusals = []
    for number in numbers:
        producer.put(
            TOPIC, b"k", b"%d" % number, [], on_refusal=lambda why, n=number: refusals.append((n, why))
        )
    return refusals


def test_the_client_s_refusals_are_reported_and_the_rest_is_produced(producer: RecordProducer) -> None:
    refusals: Refusals = []
    producer.put(TOPIC, b"k", b"1", [], on_refusal=lambda why: refusals.append((1, why)))
    # Without its headers, this record would fit.
    large = [("x", b"h" * (1 << 20))]
    producer.put(TOPIC, b"k", b"2", large, on_refusal=lambda why: refusals.append((2, why)))
    bad: Any = 5
    producer.put(TOPIC, b"k", bad, [], on_refusal=lambda why: refusals.append((3, why)))
    producer.put(TOPIC, b"k", b"4", [], on_refusal=lambda why: refusals.append((4, why)))
    producer.flush()
    assert [(number, why.code()) for number, why in refusals] == [
        (2, KafkaError.MSG_SIZE_TOO_LARGE),
        (3, KafkaError._INVALID_ARG),
    ]


def test_records_of_a_refused_batch_are_produced_alone(producer: RecordProducer) -> None:
    answer_next(producer, TOO_LARGE, NO_ERROR, TOO_LARGE, NO_ERROR)
    refusals = put(producer, 1, 2, 3)
    producer.flush()
    assert [(number, why.code()) for number, why in refusals] == [(2, KafkaError.MSG_SIZE_TOO_LARGE)]
    assert put(producer, 4) == []
    producer.flush()


def test_a_temporary_error_is_no_refusal(producer: RecordProducer) -> None:
    answer_next(producer, UNKNOWN_SERVER_ERROR)
    refusals = put(producer, 1)
    with pytest.raises(KafkaException) as failed:
        producer.flush()
    assert failed.value.args[0].code() == UNKNOWN_SERVER_ERROR
    assert refusals == []


def test_a_refusal_without_a_callback_is_raised(producer: RecordProducer) -> None:
    with pytest.raises(KafkaException):
        producer.put(TOPIC, b"k", b"v" * (1 << 20), [])
    answer_next(producer, TOO_LARGE, TOO_LARGE)
    producer.put(TOPIC, b"k", b"v", [])
    with pytest.raises(KafkaException):
        producer.flush()
    # It is raised once.
    producer.flush()
