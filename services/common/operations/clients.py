"""Kafka consumers and offsets for operations: they log nothing and raise what goes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.common.config import Settings
from services.common.kafka.admin import SILENT_LOGGER, admin_client, operator_config
from services.common.kafka.leaders import retry_while_leaderless
from services.common.kafka.topic_partition import first_error
from services.common.kafka.topics import Names
from services.common.operations.errors import NotFound

__all__ = [
    "TIMEOUT",
    "committed_offsets",
    "group_observer",
    "list_offsets",
    "missing_topic",
    "ungrouped_consumer",
]

TIMEOUT = 5.0
"""Seconds that one request to the cluster may take."""


def ungrouped_consumer(settings: Settings, **more: Any) -> Consumer:
    """Return a Consumer for partitions that are assigned by hand. It joins no group and commits nothing.

    `more` holds librdkafka's settings, with underscores for dots. Close it.
    """
    config = operator_config(settings) | {
        "group.id": Names(settings.topic_prefix).ungrouped,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
    }
    options = {name.replace("_", "."): value for name, value in more.items()}
    return Consumer(config | options, logger=SILENT_LOGGER)


def group_observer(settings: Settings, group: str) -> Consumer:
    """Return a Consumer for `committed_offsets` alone. It never subscribes, so it is no member. Close it."""
    config = operator_config(settings) | {
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
