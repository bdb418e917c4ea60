"""Says when to replace the Consumer: the coordinator is silent, or says that it owns other partitions.

The poller's thread alone uses it; any thread may read `joined`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.offset_committer import OffsetCommitter
from services.common.stage.partition_tracker import PartitionTracker

__all__ = ["Membership", "OwnershipMismatch", "OwnershipView"]

# All are seconds. A member asks the coordinator for a response after so long without one: before it has
# joined the group, and when it has nothing to commit.
_ASK_BEFORE_JOIN = 5.0
_ASK_WHEN_IDLE = 15.0
# After so long without a response the Consumer is replaced: after two outages in a row, librdkafka was seen
# to leave the connection to its coordinator closed for good.
_MAX_SILENCE = 60.0
# After trouble with a broker the coordinator is asked this often which partitions this member owns, until
# both agree after the last trouble. They may differ for so long: a rebalance takes a few heartbeats, and a
# revocation that waits for records holds up the poller itself.
_COMPARE_INTERVAL = 5.0
_MISMATCH_GRACE = 10.0
_MAX_MISMATCH_GRACE = 300.0


class OwnershipView(Protocol):
    """Asks the coordinator which partitions a member owns."""

    def request(self, member: str) -> None:
        """Ask for the partitions of this member id. Does not block."""

    def response(self) -> Collection[TopicPartition] | None:
        """Return the partitions, once; None while there is no response, or for an unknown member."""


class OwnershipMismatch:
    """Tells a mismatch that lasts from those that come and go with rebalances. Pure."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._difference: frozenset[TopicPartition] = frozenset()
        self._since = self._checked_at = 0.0

    def check(self, now: float) -> None:
        """Note that the poller runs. One held up for `grace` seconds has not seen its changes yet."""
        if now - self._checked_at >= self._grace:
            self.forget()
        self._checked_at = now

    def forget(self) -> None:
        """Start anew."""
        self._difference = frozenset()

    def lasts(
        self, owned: Collection[TopicPartition], assigned: Collection[TopicPartition], now: float
    ) -> bool:
        """Return whether these have differed in the same partitions for `grace` seconds by `now`."""
        difference = frozenset(owned) ^ frozenset(assigned)
        if difference != self._difference:
            self._difference, self._since = difference, now
        return bool(difference) and now - self._since >= self._grace


class Membership:
    """One member of a consumer group. It calls `on_error` with an error that the coordinator answers."""

    def __init__(
        self,
        topic: str,
        tracker: PartitionTracker,
        committer: OffsetCommitter,
        view: OwnershipView | None,
        on_error: Callable[[KafkaError], None],
    ) -> None:
        self._topic, self._tracker, self._committer = topic, tracker, committer
        self._view, self._on_error = view, on_error
        self._trouble_at: float | None = None
        self._grace = _MISMATCH_GRACE
        self.joined = False
        """Whether the coordinator counts this member in."""

    def use(self, consumer: Consumer) -> None:
        """Start anew with this Consumer."""
        self._consumer = consumer
        self.joined = False
        self._heard_at = self._asked_at = self._requested_at = time.monotonic()
        self._mismatch = OwnershipMismatch(self._grace)

    def on_assign(self) -> None:
        """Note that the coordinator assigned partitions to this member, or none."""
        self.joined = True
        self._heard_at = time.monotonic()

    def on_lost(self) -> None:
        """Note that the coordinator counts this member out."""
        self.joined = False

    def on_trouble(self, now: float) -> None:
        """Note trouble with a broker (`now`: monotonic seconds): it may have cost a heartbeat's response."""
        if self._trouble_at is None:
            self._requested_at = now
        self._trouble_at = now

    def check(self, now: float) -> str | None:
        """Return why the Consumer must be replaced, None while it need not be.

        Blocks for up to a second where the coordinator has been silent for a while.
        """
        grace = _ASK_WHEN_IDLE if self.joined else _ASK_BEFORE_JOIN
        if self.silence() > grace and now - self._asked_at > _ASK_BEFORE_JOIN:
            self._ask()
        if self.silence() > _MAX_SILENCE:
            return "the group's coordinator does not answer"
        if self._view is not None and self._mismatch_lasts(self._view, now):
            return "the group's coordinator assigned other partitions than this member owns"
        return None

    def silence(self) -> float:
        """Return the seconds since the coordinator's last response."""
        return time.monotonic() - max(self._heard_at, self._committer.acked_at)

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        try:
            self._consumer.committed([confluent_kafka.TopicPartition(self._topic, 0)], timeout=1)
            self.on_assign()
        except KafkaException as error:
            self._on_error(error.args[0])

    def _mismatch_lasts(self, view: OwnershipView, now: float) -> bool:
        self._mismatch.check(now)
        assigned, requested_at = view.response(), self._requested_at
        if self._trouble_at is None or not self.joined:
            self._mismatch.forget()
            return False
        if now - self._requested_at > _COMPARE_INTERVAL:
            self._requested_at = now
            view.request(self._consumer.memberid())
        if assigned is None:
            return False
        owned = {TopicPartition(a.topic, a.partition) for a in self._tracker.owned()}
        if owned == set(assigned) and requested_at > self._trouble_at:
            self._trouble_at, self._grace = None, _MISMATCH_GRACE
        if not self._mismatch.lasts(owned, assigned, now):
            return False
        # Where a new Consumer does not help, the next one comes ever later.
        self._grace = min(2 * self._grace, _MAX_MISMATCH_GRACE)
        return True
