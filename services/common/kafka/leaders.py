"""Retries a request to Kafka while its partition has no leader to serve it."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

__all__ = ["retry_while_leaderless"]

# A partition has no leader for a moment after it was created, and while its leader changes.
_LEADERLESS = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)


def retry_while_leaderless(seconds: float) -> Retrying:
    """Return a caller that repeats a request for up to `seconds` while it fails for want of a leader.

    `retry_while_leaderless(5)(function, argument)` blocks and returns the function's result. It raises any
    other error at once, and the last one when the time is over.
    """
    return Retrying(
        retry=retry_if_exception(_is_leaderless),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(0.1),
        reraise=True,
    )


def _is_leaderless(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and error.args[0].code() in _LEADERLESS
