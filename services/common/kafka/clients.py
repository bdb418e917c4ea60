"""How the Kafka clients of a stage are set."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from services.common.config import Settings
from services.common.kafka.pace import LINGER_MS
from services.common.kafka.topics import MAX_RECORD_BYTES, Names

__all__ = ["TimeoutDetectingLogger", "client_config", "consumer_config", "plain_config", "producer_config"]

# librdkafka's own lines go where all logs go.
_kafka_log = logging.getLogger("postroad.kafka")


class _RateLimitedFilter(logging.Filter):
    """Lets a line of one kind from one client through every ten seconds.

    While a broker is away librdkafka reports each refused connection, twenty a second.
    """

    _EVERY = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # The kind and the client come first, then the thread and what happened.
        kind = record.getMessage().partition(" [thrd:")[0]
        now = time.monotonic()
        if now < self._next.get(kind, 0):
            return False
        self._next[kind] = now + self._EVERY
        return True


_kafka_log.addFilter(_RateLimitedFilter())


class TimeoutDetectingLogger:
    """A client's `logger` that also calls `timed_out` when requests were not answered in their time.

    Of that librdkafka tells its log alone. The call comes on the thread that polls the client.
    """

    def __init__(self, timed_out: Callable[[], None]) -> None:
        self._timed_out = timed_out

    def log(self, level: int, text: str, *arguments: object) -> None:
        """Take a line of librdkafka's; what kind it is comes first."""
        if (str(arguments[0]) if arguments else text).startswith("REQTMOUT"):
            self._timed_out()
        _kafka_log.log(level, text, *arguments)


def client_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return what all clients are set to, their logs included."""
    return plain_config(settings, client_id) | {"logger": _kafka_log}


def plain_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return the same without the logs: text, numbers and truth values, for another process."""
    return {
        "bootstrap.servers": settings.kafka_bootstrap,
        "client.id": client_id,
        "allow.auto.create.topics": False,
        # A broker that comes back is found again within a second.
        "reconnect.backoff.max.ms": 1000,
        "reconnect.backoff.ms": 250,
        "socket.keepalive.enable": True,
        # A broker that returned under another address is given up at its old one (30 s by default).
        "socket.connection.setup.timeout.ms": 5000,
        # Bounds every request, so also a synchronous commit while a coordinator is away.
        "socket.timeout.ms": 10_000,
    }


def consumer_config(settings: Settings, stage: str, client_id: str, *, gather: bool) -> dict[str, Any]:
    """Return the consumer's settings: positions are committed by the stage runtime alone.

    `gather`: the broker may hold an answer back for up to 50 ms while there is little to send. A fetch
    names every partition, so what it costs hardly depends on what it brings.
    """
    config = client_config(settings, client_id) | {
        "group.id": Names(settings.topic_prefix).group(stage),
        "group.protocol": settings.group_protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        # Also what a group waits for a member that must give partitions up.
        "max.poll.interval.ms": max(60_000, round(settings.revoke_seconds * 3000)),
        # Memory: a fetch stops at 8 MiB in the client's queue. A larger single record still comes whole.
        "queued.max.messages.kbytes": 8 << 10,
        "max.partition.fetch.bytes": 256 << 10,
        "fetch.max.bytes": 4 << 20,
        "receive.message.max.bytes": MAX_RECORD_BYTES + (8 << 20),
        # A partition that is resumed, due again or just emptied waits for the fetch under way: no longer
        # than this. At 100 ms that wait was a stage's 90th percentile at 200 records a second.
        "fetch.wait.max.ms": 50 if gather else 20,
        "fetch.min.bytes": 64 << 10 if gather else 1,
        "fetch.error.backoff.ms": 100,
        # While the client's queue holds anything it fetches no more, so that the poller's pace is the
        # fetches' pace too: left to itself it asks again for every record that comes, at a thousand a
        # second eight times a turn. The back-off is how soon after the queue is empty it asks.
        "queued.min.messages": 1,
        "fetch.queue.backoff.ms": 2,
    }
    if settings.group_protocol == "consumer":
        # One replica gets the same partition numbers of all its topics: two never write one task's row.
        config["group.remote.assignor"] = "range"
    else:
        config |= {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 2000,
        }
    return config


def producer_config(settings: Settings, client_id: str) -> dict[str, Any]:
    """Return the producer's settings: idempotent, acked by all in-sync replicas."""
    return client_config(settings, client_id) | {
        "enable.idempotence": True,
        "acks": "all",
        "compression.type": "lz4",
        "linger.ms": LINGER_MS,
        # The Java clients' choice, so that other tools put a key where this project does.
        "partitioner": "murmur2_random",
        "message.max.bytes": MAX_RECORD_BYTES,
        # After this a delivery has failed and the caller hears of it; it may try again.
        "delivery.timeout.ms": 20_000,
        "queue.buffering.max.kbytes": 64 << 10,
    }
