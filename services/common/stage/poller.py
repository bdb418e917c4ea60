"""The thread that alone touches the Consumer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import confluent_kafka
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message

from services.common.kafka.clients import Overheard
from services.common.kafka.pace import FETCH, Pace
from services.common.kafka.topic_partition import TopicPartition
from services.common.stage import metrics
from services.common.stage.commits import Commits
from services.common.stage.intake import Intake
from services.common.stage.ledger import Assignment, Fetched, Ledger
from services.common.stage.membership import Membership, View
from services.common.stage.pauses import Pauses

__all__ = ["Poller"]

log = structlog.get_logger(__name__)

_MOST = 500
_TURN = 0.1
_PAUSED_TURN = 0.05
# How long cancelled handlers may take to come back before the consumer is closed without them.
_CANCEL_GRACE = 2.0
# How long a client's error counts as a problem, unless it is repeated.
_ERROR_LASTS = 5.0


class Poller:
    """Fetches records, hands them on in batches, and commits what came back finished.

    `hand_on` and `cancel` (of which assignments, None for all, and in how many seconds) are called on this
    thread and must be thread-safe and quick; `give_back` and `stop` may be called from any thread. `ended`
    is called last, with what made the thread end, or None.
    """

    def __init__(
        self,
        config: dict[str, Any],
        topics: Sequence[str],
        intake: Intake,
        ledger: Ledger,
        *,
        stage: str,
        revoke_seconds: float,
        drain_seconds: float,
        hand_on: Callable[[list[Fetched]], None],
        cancel: Callable[[Collection[Assignment] | None, float], None],
        ended: Callable[[BaseException | None], None],
        view: View | None = None,
        consumer: Callable[[dict[str, Any]], Consumer] = Consumer,
    ) -> None:
        self._commits, self._pauses = Commits(ledger, stage), Pauses(ledger, intake, stage)
        self._membership = Membership(topics[0], ledger, self._commits, view, self._on_error)
        self._config = config | {
            "error_cb": self._on_error,
            "on_commit": self._commits.answered,
            "logger": Overheard(self._on_timeout),
        }
        self._topics, self._intake, self._ledger, self._stage = topics, intake, ledger, stage
        self._revoke_seconds, self._drain_seconds = revoke_seconds, drain_seconds
        self._hand_on, self._cancel, self._ended, self._make = hand_on, cancel, ended, consumer
        self._pace = Pace(FETCH)
        self._returned: deque[list[Fetched]] = deque()
        self._wake = threading.Event()
        self._sleeping = False
        self._stopping = False
        self._fatal: KafkaError | None = None
        self._errors: dict[int, tuple[str, float]] = {}
        self._turned = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)
        self._owned_gauge = metrics.STAGE_PARTITIONS.labels(stage)
        metrics.STAGE_IN_FLIGHT.labels(stage).set_function(lambda: ledger.in_flight.records)
        metrics.STAGE_IN_FLIGHT_BYTES.labels(stage).set_function(lambda: ledger.in_flight.bytes)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begin to drain: no more records; the thread ends when all is given back or time is up."""
        self._stopping = True
        self._wake.set()

    def give_back(self, records: list[Fetched]) -> None:
        """Return records, finished (`finished`) or given up."""
        self._returned.append(records)
        if self._sleeping:
            self._wake.set()

    def problems(self) -> list[str]:
        """Return why records may not be coming in."""
        if not self._thread.is_alive():
            return ["the consumer is closed"]
        now = time.monotonic()
        problems = [text for text, until in list(self._errors.values()) if now < until]
        if now - self._turned > self._revoke_seconds + 5:
            problems.append(f"the poller has not turned for {now - self._turned:.0f} s")
        if not self._membership.joined:
            problems.append("not yet in the consumer group")
        return problems

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while not self._stopping:
                self._consume()
        except BaseException as problem:
            error = problem
        self._ended(error)

    def _consume(self) -> None:
        """Run one Consumer until the stage stops, or until a new one has to take its place."""
        self._consumer = self._make(self._config)
        self._commits.use(self._consumer)
        self._pauses.consumer = self._consumer
        self._membership.use(self._consumer)
        self._consumer.subscribe(
            list(self._topics),
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
        try:
            while not self._stopping:
                self._turn()
                if why := self._membership.check(self._turned):
                    log.error("leaving the group to join it anew", stage=self._stage, why=why)
                    break
            else:
                self._drain()
        finally:
            self._consumer.close()
        if left := self._ledger.owned():
            self._leave(left)
            self._cancel(left, 0)

    def _turn(self) -> None:
        now = self._turned = time.monotonic()
        self._take_back()
        self._commits.commit_if_due(now)
        if self._fatal is not None:
            raise KafkaException(self._fatal)
        self._pauses.release()
        if self._ledger.in_flight.full():
            self._pauses.no_room(now)
            messages = self._nap()
        else:
            self._pauses.room()
            messages = self._fetch(now)
        if messages:
            self._receive(messages)

    def _fetch(self, now: float) -> list[Message]:
        wait = self._pace.wait(now)
        if wait:
            time.sleep(wait)
        room = self._ledger.in_flight.room(_MOST)
        messages: list[Message] = self._consumer.consume(room, 0)
        if not messages:
            first = self._consumer.poll(self._intake.wait(_TURN))
            if first is None:
                return []
            messages = [first]
            if room > 1:
                messages += self._consumer.consume(room - 1, 0)
        self._pace.took(len(messages), time.monotonic(), full=len(messages) == room)
        return messages

    def _nap(self) -> list[Message]:
        """Take nothing while there is no room; once paused, keep polling for the group's sake."""
        self._sleeping = True
        if not self._returned:
            self._wake.wait(_PAUSED_TURN)
        self._sleeping = False
        self._wake.clear()
        if not self._pauses.resting:
            return []
        first = self._consumer.poll(0)
        # Only what was on its way before the pause took hold.
        return [first] if first is not None else []

    def _receive(self, messages: list[Message]) -> None:
        batch: list[Fetched] = []
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_error(error)
                continue
            record = self._intake.read(message)
            if record is not None:
                self._ledger.take(record)
                batch.append(record)
        self._pauses.hold()
        if batch:
            self._hand_on(batch)

    def _take_back(self) -> None:
        while self._returned:
            self._ledger.give_back(self._returned.popleft())

    # --- rebalances: called by librdkafka inside poll, consume and close ------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._count("assigned", partitions)
        self._ledger.assign(_keys(partitions))
        consumer.incremental_assign(partitions)
        self._pauses.assigned(partitions)
        self._membership.assigned()
        self._owned_gauge.set(len(self._ledger.owned()))

    def _on_revoke(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._count("revoked", partitions)
        leaving = self._ledger.select(_keys(partitions))
        deadline = time.monotonic() + (0 if self._stopping else self._revoke_seconds)
        self._settle(leaving, deadline)
        stuck = [assignment for assignment in leaving if len(assignment.offsets)]
        self._commits.commit_now(leaving, deadline)
        self._leave(leaving)
        if stuck:
            log.warning("partitions given up with records unfinished", partitions=len(stuck))
            self._cancel(stuck, 0)
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self._count("lost", partitions)
        leaving = self._ledger.select(_keys(partitions))
        self._membership.lost()
        self._leave(leaving)
        # Another replica may have them by now. What is under way may still come to its end, as it may when
        # partitions are revoked: to be cut off in the middle is what leaves a mail in doubt.
        self._cancel(leaving, self._revoke_seconds)
        consumer.incremental_unassign(partitions)

    def _leave(self, leaving: list[Assignment]) -> None:
        self._ledger.let_go(leaving)
        self._intake.forget(leaving)
        self._owned_gauge.set(len(self._ledger.owned()))

    def _settle(self, leaving: list[Assignment], deadline: float) -> None:
        """Wait until nothing of these is in flight, taking back what comes. There is no polling in here."""
        self._sleeping = True
        while True:
            self._wake.clear()
            self._take_back()
            left = deadline - time.monotonic()
            if left <= 0 or not any(len(assignment.offsets) for assignment in leaving):
                break
            self._wake.wait(min(left, 0.5))
        self._sleeping = False

    def _count(self, kind: str, partitions: list[confluent_kafka.TopicPartition]) -> None:
        metrics.STAGE_REBALANCES.labels(self._stage, kind).inc()
        log.info("partitions " + kind, stage=self._stage, count=len(partitions))

    # --- the end -----------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait for what is in flight, polling on; then commit. What stays unfinished stays uncommitted."""
        self._pauses.rest()
        deadline = time.monotonic() + self._drain_seconds
        self._empty(deadline)
        if self._ledger.in_flight.records:
            log.warning("drain time is over", unfinished=self._ledger.in_flight.records)
            self._cancel(None, 0)
            self._empty(time.monotonic() + _CANCEL_GRACE)
        self._commits.commit_now(self._ledger.owned(), time.monotonic())

    def _empty(self, deadline: float) -> None:
        while True:
            now = self._turned = time.monotonic()
            self._take_back()
            self._commits.commit_if_due(now)
            if not self._ledger.in_flight.records or now > deadline:
                return
            messages = self._nap()
            if messages:
                self._receive(messages)

    # --- trouble -----------------------------------------------------------------------------

    def _on_timeout(self) -> None:
        self._membership.doubt(time.monotonic())

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error
        # librdkafka repeats an error for as long as it lasts.
        now = time.monotonic()
        self._membership.doubt(now)
        if now >= self._errors.get(error.code(), ("", 0.0))[1]:
            log.warning("consumer", stage=self._stage, error=error.str())
        self._errors[error.code()] = (error.str(), now + _ERROR_LASTS)


def _keys(partitions: list[confluent_kafka.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(partition.topic, partition.partition) for partition in partitions]
