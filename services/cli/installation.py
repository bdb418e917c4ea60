"""What of an installation the cluster itself tells: its delays, partitions and replicas.

A command need not know the services' settings. Blocks; raises `confluent_kafka.KafkaException`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from services.cli import kafka
from services.common.config import Settings
from services.common.kafka import group_description
from services.common.kafka.clients import plain_config
from services.common.kafka.topics import EVENT_TOPICS, Names, delay_of
from services.common.stages import DELAYING, STAGES

__all__ = ["completed", "delays"]


def delays(settings: Settings, stages: Iterable[str] = DELAYING) -> Mapping[str, tuple[int, ...]]:
    """Return the delays in seconds, rising, that each of these stages reads the topics of.

    Those are all delay topics that there are, without those that none of a stage's replicas reads, which are
    of earlier settings. While a stage has no replica nobody can tell, and all count.
    """
    known = kafka.admin(settings).list_topics(timeout=kafka.TIMEOUT).topics
    return _delays(settings, list(stages), known)


def completed(settings: Settings) -> Settings:
    """Return the settings; delays, partitions and replicas that were not given are the cluster's.

    Where the cluster has no event topic of the installation they are the defaults.
    """
    names, given = Names(settings.topic_prefix), settings.model_fields_set
    stages = [stage for stage in DELAYING if STAGES[stage].delays_setting not in given]
    if not stages and {"partitions", "replication"} <= given:
        return settings
    known = kafka.admin(settings).list_topics(timeout=kafka.TIMEOUT).topics
    there = [known[name] for name in map(names.topic, EVENT_TOPICS) if name in known]
    if not there:
        return settings
    partitions = [partition for topic in there for partition in topic.partitions.values()]
    found: dict[str, Any] = {
        # Topics only grow: the most is what is wanted.
        "partitions": max(len(topic.partitions) for topic in there),
        "replication": max(len(partition.replicas) for partition in partitions),
    }
    found |= {STAGES[stage].delays_setting: all_ for stage, all_ in _delays(settings, stages, known).items()}
    if not found.get("sender_delays"):
        # It has at least one.
        found.pop("sender_delays", None)
    return settings.model_copy(update={name: value for name, value in found.items() if name not in given})


def _delays(
    settings: Settings, stages: Iterable[str], known: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    names = Names(settings.topic_prefix)
    there = {
        stage: sorted(
            seconds
            for name in known
            if (seconds := delay_of(name.removeprefix(names.prefix))) and name == names.delay(stage, seconds)
        )
        for stage in stages
    }
    if not any(there.values()):
        return dict.fromkeys(there, ())
    groups = group_description.describe(
        plain_config(settings, "postroad"), [names.group(stage) for stage in there], kafka.TIMEOUT
    )
    found = {}
    for stage, all_ in there.items():
        read = {topic for member in groups[names.group(stage)].members for topic in member.owned}
        found[stage] = tuple(s for s in all_ if names.delay(stage, s) in read) or tuple(all_)
    return found
