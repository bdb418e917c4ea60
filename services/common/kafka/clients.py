"""The librdkafka settings of every consumer and producer, and where librdkafka logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from services.common.config import Settings
from services.common.kafka.pace import LINGER_MS
from services.common.kafka.security import security_config
from services.common.kafka.topics import MAX_RECORD_BYTES, Names

__all__ = ["TimeoutDetectingLogger", "client_config", "consumer_config", "plain_config", "producer_config"]

# librdkafka's lines go where all logs go.
_kafka_log = logging.getLogger("postroad.kafka")


class _RateLimitedFilter(logging.Filter):
    """Passes one line of each kind and client every ten seconds.

    While a broker is away, librdkafka reports each refused connection: twenty a second.
    """

    _INTERVAL = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # A line names its kind and its client, then its thread and what happened.
        kind = record.getMessage().partition(" [thrd:")[0]
        now = time.monotonic()
        if now < self._next.get(kind, 0):
            return False
        self._next[kind] = now + self._INTERVAL
        return True


_kafka_log.addFilter(_RateLimitedFilter())


class TimeoutDetectingLogger:
    """A client's `logger` that also calls `on_timeout` when a request was not answered in time.

    librdkafka reports that to its log alone. The call comes on the thread that polls the client.
    """

    def __init__(self, on_timeout: Callable[[], None]) -> None:
        self._on_timeout = on_timeout

    def log(self, level: int, text: str, *arguments: object) -> None:
        """Log a line of librdkafka, which begins with its kind."""
        if (str(arguments[0]) if arguments else text).startswith("REQTMOUT"):
            self._on_timeout()
        _kafka_log.log(level, text, *arguments)


def client_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return the settings that all clients share, with their logger."""
    return plain_config(settings, client_id) | {"logger": _kafka_log}


def plain_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return the same without the logger: texts, numbers and truth values, to be sent to another process."""
    return {
        "bootstrap.servers": settings.kafka_bootstrap,
        "client.id": client_id,
        **security_config(settings),
        "allow.auto.create.topics": False,
        # The client finds a broker that comes back within a second.
        "reconnect.backoff.max.ms": 1000,
        "reconnect.backoff.ms": 250,
        "socket.keepalive.enable": True,
        # The client soon gives up the old address of a broker that has a new one (30 s by default).
        "socket.connection.setup.timeout.ms": 5000,
        # It bounds every request, so also a synchronous commit while the coordinator is away.
        "socket.timeout.ms": 10_000,
    }


def consumer_config(settings: Settings, stage: str, client_id: str, *, gather: bool) -> dict[str, Any]:
    """Return the settings of a consumer in the group of `stage`; it commits nothing by itself.

    `gather` lets the broker hold a response back for up to 100 ms while there is little to send. A fetch
    names every partition, so it costs much the same however many records it brings.
    """
    config = client_config(settings, client_id) | {
        "group.id": Names(settings.topic_prefix).group(stage),
        "group.protocol": settings.group_protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        # A group also waits so long for a member whose partitions it revokes.
        "max.poll.interval.ms": max(60_000, round(settings.revoke_seconds * 3000)),
        # Memory: fetches stop at 8 MiB in the client's queue. A larger single record still comes whole.
        "queued.max.messages.kbytes": 8 << 10,
        "max.partition.fetch.bytes": 256 << 10,
        "fetch.max.bytes": 4 << 20,
        "receive.message.max.bytes": MAX_RECORD_BYTES + (8 << 20),
        # A partition that is resumed or due waits for the fetch under way: this long at most.
        "fetch.wait.max.ms": 100,
        "fetch.min.bytes": 64 << 10 if gather else 1,
        "fetch.error.backoff.ms": 100,
        # A fetch names a partition of which fewer records than this are queued. The tasks of 50 ms come to
        # one partition: were it left out, its next records would wait for the fetch under way. Without this
        # limit the client would fill its queue from a backlog. The back-off is how soon it fetches then.
        "queued.min.messages": 256,
        "fetch.queue.backoff.ms": 2,
    }
    if settings.group_protocol == "consumer":
        # A replica owns the same partitions of all its topics, so two replicas never write one task's row.
        config["group.remote.assignor"] = "range"
    else:
        config |= {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 2000,
        }
    return config


def producer_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return a producer's settings: idempotent, acked by all in-sync replicas."""
    return client_config(settings, client_id) | {
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "lz4",
        "linger.ms": LINGER_MS,
        # The Java clients' default: other tools then put a key into the same partition.
        "partitioner": "murmur2_random",
        "message.max.bytes": MAX_RECORD_BYTES,
        # After this time a delivery has failed, and its caller may try again.
        "delivery.timeout.ms": 20_000,
        "queue.buffering.max.kbytes": 64 << 10,
    }
