"""Leaves a consumer group and closes the Consumer, within a bound. The poller's thread alone uses it.

The close of librdkafka can hang. A rebalance callback inside it may send an operation to a group that has
just terminated. No response ever comes, and the callback waits for it (librdkafka issues 4527 and 4884). So
the last revocation comes before the close, and a thread limits the close.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from confluent_kafka import Consumer, KafkaException

__all__ = ["close_consumer"]

log = structlog.get_logger(__name__)

# Seconds that the coordinator may take to revoke the partitions, and that one poll for it takes.
_REVOKE_SECONDS = 3.0
_POLL_SECONDS = 0.05


def close_consumer(
    consumer: Consumer, owns_partitions: Callable[[], object], seconds: float, on_hang: Callable[[], None]
) -> None:
    """Unsubscribe, poll until no partition is owned, and close the Consumer. Messages polled here are
    dropped.

    Blocks. A revocation may take long and ends all the same: while the coordinator is away, librdkafka keeps
    a commit for a whole session timeout. If the close takes longer than `seconds`, another thread calls
    `on_hang`; this one stays behind.
    """
    closed = threading.Event()

    def watch() -> None:
        if not closed.wait(seconds):
            log.error("the consumer does not close; its session has to end by itself", seconds=seconds)
            on_hang()

    deadline = time.monotonic() + _REVOKE_SECONDS
    try:
        consumer.unsubscribe()
        while owns_partitions() and time.monotonic() < deadline:
            consumer.poll(_POLL_SECONDS)
    except KafkaException as error:
        log.warning("the consumer could not leave its group before its close", error=str(error))
    finally:
        threading.Thread(target=watch, name="close watch", daemon=True).start()
        consumer.close()
        closed.set()
