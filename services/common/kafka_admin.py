"""Creates the topics and checks them against what `topics.wanted` says. Blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException
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
from services.common.topics import Topic, wanted

__all__ = ["Applied", "apply", "grow", "too_small"]

TIMEOUT = 15.0
_RETENTION = "retention.ms"
# What goes wrong is raised; librdkafka's own account of every refused connection helps nobody.
_silent = logging.getLogger("postroad.kafka_admin")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False


@dataclass(frozen=True, slots=True)
class Applied:
    """What was created, and in which ways topics that were there already differ from what is wanted.

    `raised`: the topics that kept their records too short a time, and now keep them as long as is wanted.
    """

    created: Sequence[str]
    raised: Sequence[str]
    differences: Sequence[str]


def apply(settings: Settings) -> Applied:
    """Create the missing topics and compare the others.

    It changes one thing of a topic that exists: a retention that is too short. Longer ones stay.
    Raises `confluent_kafka.KafkaException` where the cluster cannot be asked or refuses.
    """
    admin = _client(settings)
    topics = wanted(settings)
    known = admin.list_topics(timeout=5).topics
    missing = [topic for topic in topics if topic.name not in known]
    created = _create(admin, missing) if missing else []
    there = [topic for topic in topics if topic.name in known]
    differences = [
        f"{topic.name}: {len(known[topic.name].partitions)} partitions, wanted {topic.partitions}"
        for topic in there
        if len(known[topic.name].partitions) != topic.partitions
    ]
    short, others = _other_settings(admin, there)
    _raise_retention(admin, short)
    return Applied(created, [topic.name for topic in short], [*differences, *others])


def too_small(settings: Settings) -> dict[str, int]:
    """Return the topics that have fewer partitions than is wanted, with the number that they have.

    Raises `confluent_kafka.KafkaException`, as `grow` does.
    """
    known = _client(settings).list_topics(timeout=5).topics
    has = {name: len(topic.partitions) for name, topic in known.items()}
    return {t.name: has[t.name] for t in wanted(settings) if has.get(t.name, t.partitions) < t.partitions}


def grow(settings: Settings) -> Sequence[str]:
    """Give those topics the partitions that are wanted, and return their names.

    Keys move to other partitions by it: of one task, older records may then stand in another partition than
    newer ones. Kafka never takes a partition back.
    """
    small = too_small(settings)
    if small:
        admin = _client(settings)
        new = [NewPartitions(name, settings.partitions) for name in small]
        for done in admin.create_partitions(new, operation_timeout=TIMEOUT, request_timeout=TIMEOUT).values():
            done.result()
        _wait_until_shown(admin, dict.fromkeys(small, settings.partitions))
    return list(small)


def _client(settings: Settings) -> AdminClient:
    return AdminClient({"bootstrap.servers": settings.kafka_bootstrap}, logger=_silent)


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
            # Another one applies them at the same time.
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    # Also what another one has made at the same time, with as many partitions as that one wanted.
    _wait_until_shown(admin, {t.name: t.partitions if t.name in created else 1 for t in topics})
    return created


def _wait_until_shown(admin: AdminClient, partitions: Mapping[str, int]) -> None:
    """Wait until the topics are shown with so many partitions: a broker's metadata follow the controller's.

    Raises `confluent_kafka.KafkaException` where that takes too long.
    """
    deadline = time.monotonic() + TIMEOUT
    while True:
        known = admin.list_topics(timeout=TIMEOUT).topics
        if all(name in known and len(known[name].partitions) >= n for name, n in partitions.items()):
            return
        if time.monotonic() > deadline:
            raise KafkaException(
                KafkaError(KafkaError._TIMED_OUT, "the brokers do not show the new partitions")
            )
        time.sleep(0.05)


def _other_settings(admin: AdminClient, topics: Sequence[Topic]) -> tuple[list[Topic], list[str]]:
    """Return the topics whose retention is too short, and what else differs."""
    if not topics:
        return [], []
    asked = {ConfigResource(ResourceType.TOPIC, topic.name): topic for topic in topics}
    short, differences = [], []
    for resource, done in admin.describe_configs(list(asked), request_timeout=TIMEOUT).items():
        topic, entries = asked[resource], done.result()
        for key, value in topic.config.items():
            has = entries[key].value
            if key == _RETENTION:
                # -1 is for ever.
                if 0 <= int(has) < int(value):
                    short.append(topic)
            elif has != value:
                differences.append(f"{topic.name}: {key} is {has}, wanted {value}")
    return short, differences


def _raise_retention(admin: AdminClient, topics: Sequence[Topic]) -> None:
    if not topics:
        return
    changes = [
        ConfigResource(
            ResourceType.TOPIC,
            topic.name,
            incremental_configs=[
                ConfigEntry(_RETENTION, topic.config[_RETENTION], incremental_operation=AlterConfigOpType.SET)
            ],
        )
        for topic in topics
    ]
    for done in admin.incremental_alter_configs(changes, request_timeout=TIMEOUT).values():
        done.result()
