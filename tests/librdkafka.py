"""Calls of librdkafka that its Python client does not offer, for tests that need a client in trouble."""

from __future__ import annotations

import ctypes
from pathlib import Path

import confluent_kafka
from confluent_kafka import Consumer, Producer

__all__ = ["handle", "library", "mock_cluster", "produce_with_header"]

# rd_kafka_vtype_t, and the flag that makes the library copy the value.
_END, _TOPIC, _PARTITION, _VALUE, _KEY, _FLAGS, _HEADER = 0, 1, 3, 4, 5, 7, 9
_COPY = 2


def library() -> ctypes.CDLL:
    """Return the librdkafka that confluent_kafka has loaded."""
    (path,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    return ctypes.CDLL(str(path))


def handle(client: Producer | Consumer) -> ctypes.c_void_p:
    """Return librdkafka's handle of a client."""
    # It is the first field after the head of a Python object, which is a count and a type.
    return ctypes.c_void_p.from_address(id(client) + 2 * ctypes.sizeof(ctypes.c_void_p))


def mock_cluster(client: Producer | Consumer) -> ctypes.c_void_p:
    """Return the handle of a client's mock cluster (`test.mock.num.brokers`)."""
    api = library()
    api.rd_kafka_handle_mock_cluster.restype = ctypes.c_void_p
    return ctypes.c_void_p(api.rd_kafka_handle_mock_cluster(handle(client)))


def produce_with_header(
    producer: Producer, topic: str, partition: int, *, key: bytes, value: bytes, name: bytes
) -> None:
    """Produce a record with a header of any name, as other clients can."""
    size = ctypes.c_size_t
    error = library().rd_kafka_producev(
        handle(producer),
        *(_TOPIC, topic.encode()),
        *(_PARTITION, ctypes.c_int32(partition)),
        *(_VALUE, value, size(len(value))),
        *(_KEY, key, size(len(key))),
        *(_FLAGS, _COPY),
        *(_HEADER, name, b"", size(0)),
        _END,
    )
    assert error == 0
