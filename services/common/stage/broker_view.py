"""What the broker says of a consumer group (KIP-848, DescribeConsumerGroup)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from services.common.config import Settings
from services.common.stage.clients import admin_config
from services.common.stage.ledger import Partition
from services.common.topics import Names

__all__ = ["BrokerView"]

_TIMEOUT = 5.0


class BrokerView:
    """A `View` (membership.py) of one stage's group. Its client is made at the first question."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self._config = admin_config(settings, settings.replica_name)
        self._group = Names(settings.topic_prefix).group(stage)
        self._admin: AdminClient | None = None
        self._member = ""
        self._asked: Future[Any] | None = None

    def ask(self, member: str) -> None:
        """Ask what this member owns; a question that is still open goes on. Does not block."""
        if self._asked is not None:
            return
        if self._admin is None:
            self._admin = AdminClient(self._config)
        self._member = member
        groups = self._admin.describe_consumer_groups([self._group], request_timeout=_TIMEOUT)
        self._asked = groups[self._group]

    def answer(self) -> frozenset[Partition] | None:
        """Return what it owns, once; None while there is no answer, or where the member is not known."""
        if self._asked is None or not self._asked.done():
            return None
        asked, self._asked = self._asked, None
        try:
            members = asked.result().members
        except KafkaException:
            # Whoever cannot be asked says nothing; that a coordinator is away is told elsewhere.
            return None
        for member in members:
            if member.member_id == self._member and member.assignment is not None:
                return frozenset((p.topic, p.partition) for p in member.assignment.topic_partitions)
        return None
