"""What the broker says of a consumer group, asked in a process of its own (describe_group.py says why)."""

from __future__ import annotations

import structlog
from confluent_kafka import KafkaException

from services.common.config import Settings
from services.common.kafka.clients import plain_config
from services.common.kafka.group_description import GroupDescription
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import Names

__all__ = ["BrokerView"]

log = structlog.get_logger(__name__)

_TIMEOUT = 5.0


class BrokerView:
    """A `View` (membership.py) of one stage's group. Nothing that goes wrong here is raised: there is no
    answer then."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self._config = plain_config(settings, settings.replica_name)
        self._group = Names(settings.topic_prefix).group(stage)
        self._asking: GroupDescription | None = None

    def ask(self, member: str) -> None:
        """Ask what this member owns; a question that is still open goes on. Does not wait for the answer."""
        if self._asking is not None:
            return
        try:
            self._asking = GroupDescription(self._config, [self._group], _TIMEOUT, member)
        except OSError as error:
            log.warning("the broker cannot be asked for this member's partitions", error=str(error))

    def answer(self) -> frozenset[TopicPartition] | None:
        """Return what it owns, once; None while there is no answer, or where the member is not known."""
        if self._asking is None or not self._asking.done():
            return None
        with self._asking as asked:
            self._asking = None
            try:
                members = asked.result()[self._group].members
            except KafkaException:
                return None
        for member in members:
            return frozenset(
                TopicPartition(topic, n) for topic, numbers in member.owned.items() for n in numbers
            )
        return None
