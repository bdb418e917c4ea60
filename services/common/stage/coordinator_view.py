"""Asks a group's coordinator which partitions a member owns, in a process of its own.

kafka/describe_group.py says why that needs a process.
"""

from __future__ import annotations

import structlog
from confluent_kafka import KafkaException

from services.common.config import Settings
from services.common.kafka.clients import plain_config
from services.common.kafka.group_request import GroupRequest
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import Names

__all__ = ["CoordinatorView"]

log = structlog.get_logger(__name__)

# Seconds that one request may take.
_TIMEOUT = 5.0


class CoordinatorView:
    """The OwnershipView (membership.py) of one stage's group. Where a request fails, there is no response."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self._config = plain_config(settings, settings.replica_name)
        self._group = Names(settings.topic_prefix).group(stage)
        self._request: GroupRequest | None = None

    def request(self, member: str) -> None:
        """Ask for the partitions of this member id, unless a request is open. Does not block."""
        if self._request is not None:
            return
        try:
            self._request = GroupRequest(self._config, [self._group], _TIMEOUT, member)
        except OSError as error:
            log.warning("no process can be started to ask the coordinator", error=str(error))

    def response(self) -> frozenset[TopicPartition] | None:
        """Return the partitions, once; None while there is no response, or for an unknown member."""
        if self._request is None or not self._request.done():
            return None
        with self._request as request:
            self._request = None
            try:
                members = request.result()[self._group].members
            except KafkaException:
                return None
        for member in members:
            return frozenset(
                TopicPartition(topic, n) for topic, numbers in member.owned.items() for n in numbers
            )
        return None
