"""Kafka clients of a command: they keep silent, what goes wrong is raised."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from services.cli.errors import NOT_FOUND, Failure
from services.common.config import Settings
from services.common.kafka.leaders import retry_while_leaderless

__all__ = ["SILENT", "TIMEOUT", "admin", "committed", "missing", "offsets", "onlooker", "reader"]

TIMEOUT = 5.0
"""Seconds that one question to the cluster may take."""
# librdkafka would write a line for every refused connection.
SILENT = logging.getLogger("postroad.cli.kafka")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


def _config(settings: Settings) -> dict[str, Any]:
    # A broker that comes back is found again within a second.
    return {"bootstrap.servers": settings.kafka_bootstrap, "reconnect.backoff.max.ms": 1000}


def admin(settings: Settings) -> AdminClient:
    """Return an AdminClient of the cluster; it connects with its first question."""
    return AdminClient(_config(settings), logger=SILENT)


def reader(settings: Settings, **more: Any) -> Consumer:
    """Return a Consumer that belongs to no group: partitions are assigned by hand, nothing is committed.

    `more` are librdkafka's names with underscores for dots. Close it.
    """
    config = _config(settings) | {
        # librdkafka wants a name; nothing joins or commits under it.
        "group.id": f"{settings.topic_prefix}postroad.cli",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
    }
    return Consumer(config | {name.replace("_", "."): value for name, value in more.items()}, logger=SILENT)


def onlooker(settings: Settings, group: str) -> Consumer:
    """Return a Consumer for `committed` alone. Close it.

    It never subscribes: to the broker it is no member of the group.
    """
    config = _config(settings) | {
        "group.id": group,
        # The classic protocol's question names no member.
        "group.protocol": "classic",
        "enable.auto.commit": False,
    }
    return Consumer(config, logger=SILENT)


def committed(consumer: Consumer, partitions: Sequence[TopicPartition]) -> list[TopicPartition]:
    """Return these partitions with what the consumer's group has committed, without those of no commit.

    Blocks; raises KafkaException.
    """
    found = consumer.committed(list(partitions), timeout=TIMEOUT)
    for partition in found:
        if partition.error is not None:
            raise KafkaException(partition.error)
    return [partition for partition in found if partition.offset >= 0]


def missing(topic: str) -> Failure:
    """Return what is to be raised where this topic (full name) is not there."""
    return Failure(f"no topic {topic}: 'postroad topics apply' creates it", NOT_FOUND)


def offsets(
    client: AdminClient, asked: Mapping[TopicPartition, OffsetSpec]
) -> list[tuple[TopicPartition, int]]:
    """Return the offset asked for in each partition. Blocks; waits a while for those between two leaders."""

    def ask() -> list[tuple[TopicPartition, int]]:
        answers = client.list_offsets(dict(asked), request_timeout=TIMEOUT)
        return [(partition, answer.result().offset) for partition, answer in answers.items()]

    return retry_while_leaderless(TIMEOUT)(ask)
