"""Compares an installation's topics with the wanted ones, creates and grows them, and raises retentions.

Everything blocks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from services.common.config import Settings
from services.common.kafka.security import security_config
from services.common.kafka.topics import Topic

__all__ = [
    "SILENT_LOGGER",
    "Applied",
    "TopicDifferences",
    "admin_client",
    "apply",
    "compare",
    "grow",
    "operator_config",
]

TIMEOUT = 15.0
# A busy broker makes the files of hundreds of new partitions before it shows them.
SHOWN_SECONDS = 60.0
_RETENTION = "retention.ms"
SILENT_LOGGER = logging.getLogger("postroad.kafka_silent")
"""The logger of clients whose errors are raised: librdkafka would also log every refused connection."""
SILENT_LOGGER.addHandler(logging.NullHandler())
SILENT_LOGGER.propagate = False


@dataclass(frozen=True, slots=True)
class TopicDifferences:
    """How an installation's topics differ from the wanted ones.

    `missing` do not exist. `short` have too short a retention (name to milliseconds), `small` too few
    partitions (name to number). `differences` describe all others, a line each; Postroad changes none of
    these. `retention` is the wanted retention of every topic, in milliseconds.
    """

    missing: Sequence[Topic]
    short: Mapping[str, int]
    small: Mapping[str, int]
    differences: Sequence[str]
    retention: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.short or self.small or self.differences)


@dataclass(frozen=True, slots=True)
class Applied:
    """The topics that were `created`, those whose retention was `raised`, and the remaining `differences`."""

    created: Sequence[str]
    raised: Sequence[str]
    differences: Sequence[str]


def operator_config(settings: Settings) -> dict[str, Any]:
    """Return librdkafka's settings for a client that an operator waits for.

    The client notices within a second that a broker is back.
    """
    return {
        "bootstrap.servers": settings.kafka_bootstrap,
        "reconnect.backoff.max.ms": 1000,
        **security_config(settings),
    }


def admin_client(settings: Settings) -> AdminClient:
    """Return an AdminClient that logs nothing. It connects with its first request."""
    return AdminClient(operator_config(settings), logger=SILENT_LOGGER)


def compare(settings: Settings, topics: Sequence[Topic]) -> TopicDifferences:
    """Compare the cluster's topics with these. Changes nothing.

    Raises `confluent_kafka.KafkaException` where the cluster does not answer.
    """
    admin = admin_client(settings)
    known = admin.list_topics(timeout=5).topics
    there = [topic for topic in topics if topic.name in known]
    has = {topic.name: len(known[topic.name].partitions) for topic in there}
    short, others = _other_settings(admin, there)
    return TopicDifferences(
        [topic for topic in topics if topic.name not in known],
        short,
        {topic.name: has[topic.name] for topic in there if has[topic.name] < topic.partitions},
        [
            *(
                f"{t.name}: {has[t.name]} partitions, wanted {t.partitions}"
                for t in there
                if has[t.name] > t.partitions
            ),
            *others,
        ],
        {topic.name: topic.config[_RETENTION] for topic in topics},
    )


def apply(settings: Settings, topics: Sequence[Topic], found: TopicDifferences | None = None) -> Applied:
    """Create the missing of these topics and raise too short retentions: as `found`, or by a new comparison.

    It changes nothing else of a topic that exists. Raises `confluent_kafka.KafkaException` where the cluster
    does not answer or refuses.
    """
    found = found or compare(settings, topics)
    admin = admin_client(settings)
    created = _create(admin, found.missing) if found.missing else []
    _raise_retention(admin, {name: found.retention[name] for name in found.short})
    small = [f"{name}: {n} partitions, wanted {settings.partitions}" for name, n in found.small.items()]
    return Applied(created, list(found.short), [*small, *found.differences])


def grow(settings: Settings, small: Collection[str]) -> None:
    """Give these topics as many partitions as the settings want.

    Keys then move to other partitions: a task's older and newer records may be in different ones. Kafka never
    removes a partition. Raises `confluent_kafka.KafkaException`.
    """
    if small:
        admin = admin_client(settings)
        new = [NewPartitions(name, settings.partitions) for name in small]
        for done in admin.create_partitions(new, operation_timeout=TIMEOUT, request_timeout=TIMEOUT).values():
            done.result()
        _wait_until_shown(admin, dict.fromkeys(small, settings.partitions))


def _create(admin: AdminClient, topics: Sequence[Topic]) -> list[str]:
    new = [
        NewTopic(
            topic.name,
            num_partitions=topic.partitions,
            replication_factor=topic.replication,
            config=dict(topic.config),
        )
        for topic in topics
    ]
    created = []
    for name, done in admin.create_topics(new, operation_timeout=TIMEOUT, request_timeout=TIMEOUT).items():
        try:
            done.result()
            created.append(name)
        except KafkaException as error:
            # Another process applies them at the same time.
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    # A topic that another process created has as many partitions as that one wanted.
    _wait_until_shown(admin, {t.name: t.partitions if t.name in created else 1 for t in topics})
    return created


def _wait_until_shown(admin: AdminClient, partitions: Mapping[str, int]) -> None:
    """Wait until the brokers show the topics with so many partitions: they learn of them from the controller.

    Raises `confluent_kafka.KafkaException` after SHOWN_SECONDS.
    """
    deadline, pause = time.monotonic() + SHOWN_SECONDS, 0.05
    while partitions := _not_shown(admin, partitions):
        if time.monotonic() > deadline:
            raise KafkaException(
                KafkaError(KafkaError._TIMED_OUT, "the brokers do not show the new partitions")
            )
        # A broker that is behind gets no further by answering.
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _not_shown(admin: AdminClient, partitions: Mapping[str, int]) -> dict[str, int]:
    """Return the topics that a broker shows with fewer partitions than these, or not at all."""
    # Only these topics: a cluster may have thousands of others.
    asked = admin.describe_topics(TopicCollection(list(partitions)), request_timeout=TIMEOUT)
    behind = {}
    for name, answer in asked.items():
        try:
            shown = len(answer.result().partitions)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise
            shown = 0
        if shown < partitions[name]:
            behind[name] = partitions[name]
    return behind


def _other_settings(admin: AdminClient, topics: Sequence[Topic]) -> tuple[dict[str, int], list[str]]:
    """Return the retentions (milliseconds, by topic) that are too short, and a line per other difference."""
    if not topics:
        return {}, []
    asked = {ConfigResource(ResourceType.TOPIC, topic.name): topic for topic in topics}
    short, differences = dict[str, int](), list[str]()
    for resource, done in admin.describe_configs(list(asked), request_timeout=TIMEOUT).items():
        topic, entries = asked[resource], done.result()
        for key, value in topic.config.items():
            has = entries[key].value
            if key == _RETENTION:
                # -1 means without end.
                if 0 <= int(has) < int(value):
                    short[topic.name] = int(has)
            elif has != value:
                differences.append(f"{topic.name}: {key} is {has}, wanted {value}")
    return short, differences


def _raise_retention(admin: AdminClient, topics: Mapping[str, str]) -> None:
    if not topics:
        return
    changes = [
        ConfigResource(
            ResourceType.TOPIC,
            name,
            incremental_configs=[
                ConfigEntry(_RETENTION, retention, incremental_operation=AlterConfigOpType.SET)
            ],
        )
        for name, retention in topics.items()
    ]
    for done in admin.incremental_alter_configs(changes, request_timeout=TIMEOUT).values():
        done.result()
