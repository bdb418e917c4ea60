"""Partitions between two leaders: a question to Kafka that is asked again until there is one."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

__all__ = ["until_led"]

# A partition that was just made, or whose leader changes, has no answer for a moment.
_LEADERLESS = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)


def until_led(seconds: float) -> Retrying:
    """Return what calls a function, `until_led(5)(function, argument)`, again for so long; it blocks.

    The last error is raised, and every other one at once.
    """
    return Retrying(
        retry=retry_if_exception(_leaderless),
        stop=stop_after_delay(seconds),
        wait=wait_fixed(0.1),
        reraise=True,
    )


def _leaderless(error: BaseException) -> bool:
    return isinstance(error, KafkaException) and error.args[0].code() in _LEADERLESS
