"""The watchers that one catch-up serves. It reads from the earliest position, each from its own. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from services.api.watch import resume_tokens
from services.api.watch.applied_changes import AppliedChange
from services.api.watch.messages import WatchMessage
from services.api.watch.watchers import Watcher, WatcherIndex
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["SafePositions", "Subscriber", "Subscribers"]


class SafePositions(NamedTuple):
    """The positions before which every message has been sent. `text` is their part of a resume token."""

    positions: Mapping[TopicPartition, int]
    text: str

    @classmethod
    def of(cls, positions: Mapping[TopicPartition, int]) -> SafePositions:
        """Return a copy of these positions, with their text."""
        return cls(dict(positions), resume_tokens.encode_positions(positions))


class Subscriber:
    """A watcher that has received everything before `positions`. A missing partition begins at 0."""

    def __init__(self, watcher: Watcher, positions: Mapping[TopicPartition, int]) -> None:
        self.watcher, self.positions = watcher, positions
        self._encoded: tuple[SafePositions, str] | None = None
        self._ahead = True

    def position(self, partition: TopicPartition) -> int:
        """Return the offset from which it has not received the partition."""
        return self.positions.get(partition, 0)

    def with_token(self, message: WatchMessage, safe: SafePositions) -> WatchMessage:
        """Return the message with this subscriber's token, which never lies before its own positions."""
        if self._encoded is None or self._encoded[0] is not safe:
            text = safe.text
            if self._ahead:
                later = {
                    partition: max(offset, self.position(partition))
                    for partition, offset in {**self.positions, **safe.positions}.items()
                }
                self._ahead = later != safe.positions
                text = resume_tokens.encode_positions(later)
            self._encoded = safe, text
        return message._replace(positions_text=self._encoded[1])

    def has_expired(
        self,
        begins: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
        unknown: Collection[TopicPartition],
    ) -> bool:
        """Return whether the topics lost records that it has not received, or are not those of its token."""
        return (
            any(self.position(partition) < begin for partition, begin in begins.items())
            or any(self.position(partition) > end for partition, end in ends.items())
            or not self.positions.keys().isdisjoint(unknown)
        )


class Subscribers:
    """Several subscribers; finds those that must receive a change."""

    def __init__(self, subscribers: Iterable[Subscriber]) -> None:
        self._by_watcher = {subscriber.watcher: subscriber for subscriber in subscribers}
        self._index = WatcherIndex()
        for watcher in self._by_watcher:
            self._index.add(watcher)
        tasks = {watcher.selection.task for watcher in self._by_watcher}
        self._tasks = None if None in tasks else tasks

    def __iter__(self) -> Iterator[Subscriber]:
        return iter(list(self._by_watcher.values()))

    def remove(self, subscriber: Subscriber) -> None:
        """Remove a subscriber, if it is among these."""
        self._index.remove(subscriber.watcher)
        self._by_watcher.pop(subscriber.watcher, None)

    def earliest_positions(self) -> dict[TopicPartition, int]:
        """Return the positions from which a reader misses nothing for anyone."""
        subscribers = list(self._by_watcher.values())
        return {
            partition: min(subscriber.position(partition) for subscriber in subscribers)
            for partition in {p for subscriber in subscribers for p in subscriber.positions}
        }

    def may_select(self, task: bytes | None) -> bool:
        """Return whether any of them may select this task."""
        return self._tasks is None or task in self._tasks

    def find(self, applied: AppliedChange) -> list[Subscriber]:
        """Return those that select the change's task and have not received the change."""
        change, row = applied
        found = [self._by_watcher[watcher] for watcher in self._index.find(row)]
        return [s for s in found if change.offset >= s.position(change.partition)]
