"""confluent_kafka's Consumer over the in-memory broker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.in_flight_record import InFlightRecord
from tests.simulation.broker import Broker, Message
from tests.simulation.process import Process

__all__ = ["Consumer"]


class Consumer:
    """The part of confluent_kafka's Consumer that a stage uses. Blocks its simulated thread.

    `due` returns when its poller next has something to do, in virtual seconds. `behind` returns whether the
    poller has more to commit than what is being committed. With both, an idle poller need not turn ten times
    a second.
    """

    def __init__(self, broker: Broker, process: Process, config: dict[str, Any]) -> None:
        self.process = process
        self.member = False
        self.epoch = 0
        """The number of its memberships so far."""
        self.leaving: set[TopicPartition] = set()
        self.due: Callable[[], float] = lambda: float("inf")
        self.behind: Callable[[], bool] = lambda: True
        self.taken: dict[TopicPartition, list[InFlightRecord]] = {}
        """The records that the stage took from each partition since its assignment, to check the commits."""
        self._broker, self._world = broker, broker.world
        self._group = broker.group(config["group.id"])
        self._on_commit = config["on_commit"]
        self._positions: dict[TopicPartition, int] = {}
        self._paused: set[TopicPartition] = set()
        self._highest: dict[TopicPartition, int] = {}
        self._events: deque[tuple[str, Any]] = deque()
        self._waiting = False
        self._closed = self._left = False
        self._turn = 0
        self._fresh = False
        """True when there may be something to fetch."""
        self._arrival = self._last_notice = 0.0
        self._polls, self._polled = 0, 0.0

    def subscribe(self, topics: Sequence[str], on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self._topics, self._on_assign, self._on_revoke, self._on_lost = topics, on_assign, on_revoke, on_lost
        self._join()

    def unsubscribe(self) -> None:
        self._closed = True
        self._events.append(("unsubscribed", None))

    def _join(self) -> None:
        scheduler = self._world.scheduler
        scheduler.after(scheduler.latency(0.02), self.process, self._group.join, self, self._topics)

    # --- reading ---

    def consume(self, num_messages: int, timeout: float) -> list[Message]:
        self._serve()
        return self._next(num_messages)

    def poll(self, timeout: float) -> Message | None:
        self._watch()
        self._serve()
        if not (found := self._next(1)) and timeout > 0:
            now = self._world.now
            seconds = min(timeout, max(0.0, self.due() - now))
            self._wait(seconds if seconds < 1e6 else None)
            self._serve()
            found = self._next(1)
        return found[0] if found else None

    def get_watermark_offsets(
        self, partition: confluent_kafka.TopicPartition, *, cached: bool
    ) -> tuple[int, int]:
        return 0, self._broker.logs[partition.topic, partition.partition].end

    def _watch(self) -> None:
        now = self._world.now
        self._polls = self._polls + 1 if now == self._polled else 0
        self._polled = now
        if self._polls > 1000:
            self._world.violation(f"{self.process.service} polls without a pause")
            raise RuntimeError("polls without a pause")

    def _wait(self, seconds: float | None) -> None:
        thread = self._world.scheduler.running
        assert thread is not None
        self._thread = thread
        self._waiting = True
        thread.block(seconds)
        self._waiting = False

    def _next(self, most: int) -> list[Message]:
        if not self._fresh or not self._positions or not self._world.up("kafka"):
            return []
        places = list(self._positions)
        self._turn += 1
        start = self._turn % len(places)
        found: list[Message] = []
        logs = self._broker.logs
        for place in places[start:] + places[:start]:
            position = self._positions[place]
            if position >= logs[place].end or place in self._paused:
                continue
            if len(found) >= most:
                break
            part = self._broker.read(place, position, most - len(found))
            self._positions[place] = part[-1].offset() + 1
            found += part
        else:
            self._fresh = len(found) >= most
        if found:
            self._world.operation("fetch", self.process)
        return found

    def pause(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._paused.update(_places(partitions))

    def resume(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._fresh = True
        self._paused.difference_update(_places(partitions))

    def seek(self, partition: confluent_kafka.TopicPartition) -> None:
        [place] = _places([partition])
        if place in self._positions:
            self._positions[place] = partition.offset
            self._fresh = True

    def committed(
        self, partitions: list[confluent_kafka.TopicPartition], timeout: float
    ) -> list[confluent_kafka.TopicPartition]:
        if not self._world.up("kafka"):
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return partitions

    @property
    def reachable(self) -> bool:
        """True when the coordinator answers."""
        return self._world.up("kafka")

    # --- waking ---

    def wake(self) -> None:
        """Wake the poller: there is something to fetch."""
        self._fresh = True
        if self._waiting and self._thread is not None:
            self._thread.notify(self._world.scheduler.latency())

    def nudge(self, earliest: float = 0.0) -> None:
        """Wake the poller, which has something to do at one of its next turns."""
        if self._waiting and self._thread is not None:
            self._thread.notify(max(earliest, self._world.scheduler.rng.random() * 0.1))

    def notify(self, kind: str, what: Any) -> None:
        """Send a notice of the coordinator, which arrives after a latency."""
        scheduler = self._world.scheduler
        # Notices arrive in the order in which they were sent.
        self._last_notice = max(self._last_notice, scheduler.now + scheduler.latency(0.02)) + 1e-6
        scheduler.after(self._last_notice - scheduler.now, self.process, self._hear, kind, what, self.epoch)

    def fence(self) -> None:
        """Fence this member. It learns of that up to a heartbeat later."""
        if self.member:
            self._world.trace(self.process.name, "is fenced")
            self._group.leave(self)
            scheduler = self._world.scheduler
            scheduler.after(2 * scheduler.rng.random(), self.process, self._hear, "lost", None)

    def redeliver(self) -> None:
        """Fetch from the committed offsets again, as after a reset by the broker."""
        for place in self._positions:
            self._positions[place] = self._group.committed.get(place, 0)
        self.wake()

    def _hear(self, kind: str, what: Any, epoch: int | None = None) -> None:
        if epoch is None or epoch == self.epoch:
            self._events.append((kind, what))
            if kind != "commit" or what[0] is not None or self.behind():
                self.wake()

    def _serve(self) -> None:
        while self._events:
            kind, what = self._events.popleft()
            if kind == "commit":
                self._on_commit(*what)
            elif kind == "assign":
                if self.member:
                    self._on_assign(self, _partitions(what))
            elif kind == "revoke":
                if self.member:
                    self._on_revoke(self, _partitions(place for place in what if place in self._positions))
                    self._request(self._group.released, self, self.epoch, what)
            elif kind == "unsubscribed":
                self._leave()
            elif not self.member:
                self._on_lost(self, _partitions(self._positions))
                self._positions.clear()
                self.leaving.clear()
                if not self._closed:
                    self._join()

    def incremental_assign(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._fresh = True
        for place in _places(partitions):
            self._positions[place] = self._group.committed.get(place, 0)
            self._highest[place] = 0
            self.taken[place] = []
            self._paused.discard(place)

    def incremental_unassign(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        for place in _places(partitions):
            self._positions.pop(place, None)
            self.taken.pop(place, None)

    # --- committing ---

    def commit(
        self, offsets: list[confluent_kafka.TopicPartition], asynchronous: bool
    ) -> list[confluent_kafka.TopicPartition] | None:
        thread = self._world.scheduler.running
        assert thread is not None
        positions = dict(zip(_places(offsets), (p.offset for p in offsets), strict=True))
        answer: list[KafkaError | None] = []
        epoch = self.epoch

        def arrive() -> None:
            verdict = self._world.operation("commit", self.process)
            if not self._world.up("kafka"):
                error, wait = KafkaError(KafkaError._TIMED_OUT), 1.0
            elif verdict == "refused":
                error, wait = KafkaError(KafkaError.NOT_COORDINATOR), 0.0
            else:
                error, wait = self._group.commit(self, epoch, positions), 0.0  # type: ignore[assignment]
                if verdict == "unheard":
                    error, wait = KafkaError(KafkaError._TIMED_OUT), 1.0
            answer.append(error)
            delay = wait + self._world.scheduler.latency()
            if asynchronous:
                self._world.scheduler.after(delay, self.process, self._hear, "commit", (error, offsets))
            else:
                thread.notify(delay)

        self._request(arrive)
        if asynchronous:
            return None
        while not answer:
            thread.block(None)
        if answer[0] is not None:
            raise KafkaException(answer[0])
        return offsets

    def _request(self, call: Callable[..., object], *args: object) -> None:
        # There is one connection to the coordinator, so requests arrive in order.
        scheduler = self._world.scheduler
        self._arrival = max(self._arrival, scheduler.now + scheduler.latency()) + 1e-6
        scheduler.after(self._arrival - scheduler.now, None, call, *args)

    def check(self, place: TopicPartition, position: int) -> None:
        """Check a commit: of owned partitions only (I7), never backwards or past unfinished records (I1)."""
        who, where = self.process.name, f"{place[0]}/{place[1]}"
        if self._group.owners.get(place) is not self:
            self._world.violation(f"{who} committed {where}, which it does not own")
            return
        if position < self._highest.get(place, 0):
            self._world.violation(f"{who} took its commit of {where} back to {position}")
        self._highest[place] = position
        below = [record for record in self.taken.get(place, ()) if record.offset < position]
        # A record that was fetched twice needs to be finished once.
        for offset in {record.offset for record in below}.difference(r.offset for r in below if r.finished):
            self._world.violation(f"{who} committed {where}@{position} with @{offset} unfinished")

    def close(self) -> None:
        self._closed = True
        if not self.process.dead:
            self._leave()

    def _leave(self) -> None:
        if self._left:
            return
        self._left = True
        if self.member and self._positions:
            self._on_revoke(self, _partitions(self._positions))
        self._request(self._group.leave, self)


def _places(partitions: Iterable[confluent_kafka.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(p.topic, p.partition) for p in partitions]


def _partitions(places: Iterable[TopicPartition]) -> list[confluent_kafka.TopicPartition]:
    return [confluent_kafka.TopicPartition(topic, partition) for topic, partition in places]
