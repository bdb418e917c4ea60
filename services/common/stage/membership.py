"""Whether this member is heard by its group's coordinator, and agrees with it on what it owns.

Used on the poller's thread alone, but for `joined`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.commits import Commits
from services.common.stage.ledger import Ledger

__all__ = ["Agreement", "Membership", "View"]

# A member that got no partition in this time asks the coordinator whether it is heard at all.
_IDLE_MEMBER = 5.0
# A member that has nothing to commit asks this often.
_QUIET = 15.0
# A Consumer that reaches no coordinator for so long is replaced: after two outages in a row librdkafka was
# seen to leave its coordinator's connection closed for good.
_UNHEARD = 60.0
# From the first trouble with a broker on, this often it is asked what this member owns, until both see it
# alike after the last; how long they may differ. A change of the group passes within a few heartbeats; what a
# revocation waits for holds up the poller itself.
_COMPARE = 5.0
_DIFFER = 10.0
_DIFFER_MOST = 300.0


class View(Protocol):
    """What the coordinator says of its group."""

    def ask(self, member: str) -> None:
        """Ask what this member owns. Does not block."""

    def answer(self) -> Collection[TopicPartition] | None:
        """Return the answer, once; None while there is none, or where the member is not known."""


class Agreement:
    """Tells a difference that stays from those that come and go with the group's changes. Pure."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._difference: frozenset[TopicPartition] = frozenset()
        self._since = self._seen = 0.0

    def broken(self, owned: Collection[TopicPartition], told: Collection[TopicPartition], now: float) -> bool:
        """Return whether these have differed in the same partitions for `patience` seconds by `now`.

        What was not looked at for as long begins anew.
        """
        difference = frozenset(owned) ^ frozenset(told)
        if difference != self._difference or now - self._seen >= self._patience:
            self._difference, self._since = difference, now
        self._seen = now
        return bool(difference) and now - self._since >= self._patience


class Membership:
    """One member's place in its group. `trouble` is told what the coordinator answers when it is asked."""

    def __init__(
        self,
        topic: str,
        ledger: Ledger,
        commits: Commits,
        view: View | None,
        trouble: Callable[[KafkaError], None],
    ) -> None:
        self._topic, self._ledger, self._commits = topic, ledger, commits
        self._view, self._trouble = view, trouble
        self._doubted_at: float | None = None
        self._patience = _DIFFER
        self.joined = False
        """Whether the group counts this member in."""

    def use(self, consumer: Consumer) -> None:
        """Begin anew with this Consumer."""
        self._consumer = consumer
        self.joined = False
        self._heard = self._asked = self._compared = time.monotonic()
        self._agreement = Agreement(self._patience)

    def assigned(self) -> None:
        """Note that the coordinator has given this member partitions, or none."""
        self.joined = True
        self._heard = time.monotonic()

    def lost(self) -> None:
        """Note that the coordinator counts this member out."""
        self.joined = False

    def doubt(self, now: float) -> None:
        """Note trouble with a broker (`now`: monotonic seconds): a heartbeat's answer may be lost with it."""
        if self._doubted_at is None:
            self._compared = now
        self._doubted_at = now

    def check(self, now: float) -> str | None:
        """Return why another Consumer must take this one's place, None while none must.

        May block for a second, where the coordinator was not heard of for a while.
        """
        patience = _QUIET if self.joined else _IDLE_MEMBER
        if self.silence() > patience and now - self._asked > _IDLE_MEMBER:
            self._ask()
        if self.silence() > _UNHEARD:
            return "the group's coordinator is not reached"
        if self._view is not None and self._differs(self._view, now):
            return "the group's coordinator sees other partitions here"
        return None

    def silence(self) -> float:
        """Return the seconds since the group's coordinator was last heard of."""
        return time.monotonic() - max(self._heard, self._commits.acked_at)

    def _ask(self) -> None:
        self._asked = time.monotonic()
        try:
            self._consumer.committed([confluent_kafka.TopicPartition(self._topic, 0)], timeout=1)
            self.assigned()
        except KafkaException as error:
            self._trouble(error.args[0])

    def _differs(self, view: View, now: float) -> bool:
        told, asked_at = view.answer(), self._compared
        if self._doubted_at is None or not self.joined:
            return False
        if now - self._compared > _COMPARE:
            self._compared = now
            view.ask(self._consumer.memberid())
        if told is None:
            return False
        owned = {TopicPartition(a.topic, a.partition) for a in self._ledger.owned()}
        if owned == set(told) and asked_at > self._doubted_at:
            self._doubted_at, self._patience = None, _DIFFER
        if not self._agreement.broken(owned, told, now):
            return False
        # Where joining anew does not help, it is done ever more seldom.
        self._patience = min(2 * self._patience, _DIFFER_MOST)
        return True
