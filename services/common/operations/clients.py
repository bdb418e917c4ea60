"""Kafka clients of an operation: they log nothing and raise what goes wrong. And the database's URL."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from sqlalchemy import URL

from services.common.config import Settings
from services.common.database import engine
from services.common.kafka.leaders import retry_while_leaderless
from services.common.kafka.topic_partition import first_error
from services.common.kafka.topics import Names
from services.common.operations.errors import InvalidDatabaseUrl, NotFound

__all__ = [
    "SILENT_LOGGER",
    "TIMEOUT",
    "admin_client",
    "committed_offsets",
    "database_url",
    "group_observer",
    "list_offsets",
    "missing_topic",
    "ungrouped_consumer",
]

TIMEOUT = 5.0
"""Seconds that one request to the cluster may take."""
# librdkafka would write a line for every refused connection.
SILENT_LOGGER = logging.getLogger("postroad.operations.kafka")
SILENT_LOGGER.addHandler(logging.NullHandler())
SILENT_LOGGER.propagate = False


def _config(settings: Settings) -> dict[str, Any]:
    # The client notices within a second that a broker is back.
    return {"bootstrap.servers": settings.kafka_bootstrap, "reconnect.backoff.max.ms": 1000}


def admin_client(settings: Settings) -> AdminClient:
    """Return an AdminClient of the cluster. It connects with its first request."""
    return AdminClient(_config(settings), logger=SILENT_LOGGER)


def ungrouped_consumer(settings: Settings, **more: Any) -> Consumer:
    """Return a Consumer for partitions that are assigned by hand. It joins no group and commits nothing.

    `more` holds librdkafka's settings, with underscores for dots. Close it.
    """
    config = _config(settings) | {
        "group.id": Names(settings.topic_prefix).ungrouped,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
    }
    options = {name.replace("_", "."): value for name, value in more.items()}
    return Consumer(config | options, logger=SILENT_LOGGER)


def group_observer(settings: Settings, group: str) -> Consumer:
    """Return a Consumer for `committed_offsets` alone. It never subscribes, so it is no member. Close it."""
    config = _config(settings) | {
        "group.id": group,
        # In the classic protocol the request names no member.
        "group.protocol": "classic",
        "enable.auto.commit": False,
    }
    return Consumer(config, logger=SILENT_LOGGER)


def committed_offsets(
    observer: Consumer, partitions: Sequence[confluent_kafka.TopicPartition]
) -> list[confluent_kafka.TopicPartition]:
    """Return these partitions with their group's committed offsets, without those that have none.

    Blocks. Raises KafkaException.
    """
    found = observer.committed(list(partitions), timeout=TIMEOUT)
    if error := first_error(found):
        raise KafkaException(error)
    return [partition for partition in found if partition.offset >= 0]


def list_offsets(
    settings: Settings, asked: Mapping[confluent_kafka.TopicPartition, OffsetSpec]
) -> list[tuple[confluent_kafka.TopicPartition, int]]:
    """Return each partition with the offset asked for.

    Blocks, up to `TIMEOUT` also while a partition has no leader. Raises KafkaException.
    """

    def ask() -> list[tuple[confluent_kafka.TopicPartition, int]]:
        # An AdminClient keeps the leaders and leader epochs that it knows. After an election it answers
        # FENCED_LEADER_EPOCH (KIP-320), or that there is no leader, until its metadata expire.
        client = admin_client(settings)
        answers = client.list_offsets(dict(asked), request_timeout=TIMEOUT)
        try:
            return [(partition, answer.result().offset) for partition, answer in answers.items()]
        except KafkaException as error:
            if error.args[0].code() != KafkaError._NOENT:
                raise
            # The client says so where it finds no leader of any partition.
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE, error.args[0].str())) from error

    return retry_while_leaderless(TIMEOUT)(ask)


def missing_topic(topic: str) -> NotFound:
    """Return the error that says that a topic (full name) does not exist."""
    return NotFound(f"no topic {topic}: 'postroad topics apply' creates it")


def database_url(settings: Settings) -> URL:
    """Return the database's URL. Raises InvalidDatabaseUrl, whose text holds no password."""
    try:
        return engine.url_of(settings.database_url.get_secret_value())
    except ValueError as error:
        raise InvalidDatabaseUrl(str(error)) from None
