"""Checks on a thread of its own whether Kafka answers and has the topics that a service needs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from services.common.config import Settings
from services.common.kafka.clients import client_config

__all__ = ["ClusterCheck"]

log = structlog.get_logger(__name__)

# Seconds between two checks: while all is well, and after a check that found a problem.
_INTERVAL = 5.0
_RETRY_INTERVAL = 1.0
# Seconds that one request may take.
_TIMEOUT = 3.0


class ClusterCheck:
    """Asks for these topics (full names) every few seconds.

    A service's own clients report neither problem. With nothing to send, a producer does not notice that the
    brokers are away. A consumer waits in silence for a topic that does not exist.
    """

    def __init__(self, settings: Settings, topics: Sequence[str]) -> None:
        self._settings, self._topics = settings, topics
        self._problems: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster check", daemon=True)

    def start(self) -> None:
        """Start to check. Does not block."""
        self._thread.start()

    def stop(self) -> None:
        """Check no more; a request under way ends by itself. Does not block."""
        self._stopping.set()

    def problems(self) -> list[str]:
        """Return what is wrong, empty before the first response. Safe from any thread."""
        return self._problems

    def _run(self) -> None:
        admin = AdminClient(client_config(self._settings, self._settings.replica_name))
        while not self._stopping.is_set():
            found = self._check(admin)
            if found and not self._problems:
                # A broker may be slow once, or has just started and does not know all topics yet.
                self._stopping.wait(_RETRY_INTERVAL)
                found = self._check(admin)
            if found != self._problems:
                log.warning("the problems of the Kafka cluster changed", problems=found)
            self._problems = found
            self._stopping.wait(_RETRY_INTERVAL if found else _INTERVAL)

    def _check(self, admin: AdminClient) -> list[str]:
        try:
            return [text for name in self._topics if (text := _problem(admin, name))]
        except KafkaException as error:
            return [f"Kafka at {self._settings.kafka_bootstrap} does not answer: {error.args[0].str()}"]


def _problem(admin: AdminClient, name: str) -> str:
    topic = admin.list_topics(name, timeout=_TIMEOUT).topics[name]
    error = topic.error
    if error is not None and error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        return f"Kafka has no topic {name}"
    if error is not None and error.code() != KafkaError.LEADER_NOT_AVAILABLE:
        return f"Kafka's topic {name}: {error.str()}"
    leaderless = sum(partition.leader < 0 for partition in topic.partitions.values())
    return f"Kafka's topic {name}: {leaderless} partitions have no leader" if leaderless else ""
