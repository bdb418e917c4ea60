"""What the cluster itself says of an installation: its delays, partitions and replicas.

An operation need not know the services' settings. Blocks. Raises `confluent_kafka.KafkaException`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from services.common.config import Settings
from services.common.kafka import group_request
from services.common.kafka.admin import admin_client
from services.common.kafka.clients import plain_config
from services.common.kafka.topics import EVENT_TOPICS, Names, delay_of
from services.common.operations.clients import TIMEOUT
from services.common.stages import DELAYING, STAGES

__all__ = ["current_delays", "with_cluster_settings"]


def current_delays(settings: Settings, stages: Iterable[str] = DELAYING) -> Mapping[str, tuple[int, ...]]:
    """Return the delays of each stage in seconds, rising, from the delay topics that its replicas read.

    A delay topic that no replica reads is left over from earlier settings. While a stage has no replica, all
    its delay topics count.
    """
    known = admin_client(settings).list_topics(timeout=TIMEOUT).topics
    return _delays(settings, list(stages), known)


def with_cluster_settings(settings: Settings) -> Settings:
    """Return the settings with the cluster's delays, partitions and replicas where none are given.

    Where the cluster has no event topic of the installation, they stay the defaults.
    """
    names, given = Names(settings.topic_prefix), settings.model_fields_set
    stages = [stage for stage in DELAYING if STAGES[stage].delays_setting not in given]
    if not stages and {"partitions", "replication"} <= given:
        return settings
    known = admin_client(settings).list_topics(timeout=TIMEOUT).topics
    present = [known[name] for name in map(names.topic, EVENT_TOPICS) if name in known]
    if not present:
        return settings
    partitions = [partition for topic in present for partition in topic.partitions.values()]
    found: dict[str, Any] = {
        # Topics only grow: the largest number is what all should have.
        "partitions": max(len(topic.partitions) for topic in present),
        "replication": max(len(partition.replicas) for partition in partitions),
    }
    found |= {STAGES[stage].delays_setting: all_ for stage, all_ in _delays(settings, stages, known).items()}
    if not found.get("sender_delays"):
        # The sender needs at least one delay.
        found.pop("sender_delays", None)
    return settings.model_copy(update={name: value for name, value in found.items() if name not in given})


def _delays(
    settings: Settings, stages: Iterable[str], known: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    names = Names(settings.topic_prefix)
    present = {
        stage: sorted(
            seconds
            for name in known
            if (seconds := delay_of(name.removeprefix(names.prefix))) and name == names.delay(stage, seconds)
        )
        for stage in stages
    }
    if not any(present.values()):
        return dict.fromkeys(present, ())
    groups = group_request.describe(
        plain_config(settings, "postroad"), [names.group(stage) for stage in present], TIMEOUT
    )
    found = {}
    for stage, all_ in present.items():
        read = {topic for member in groups[names.group(stage)].members for topic in member.owned}
        found[stage] = tuple(s for s in all_ if names.delay(stage, s) in read) or tuple(all_)
    return found
