"""Polls Kafka: fetches records, hands them to the event loop, and commits what comes back finished.

Only the poller's thread touches the Consumer (I5 in docs/guarantees.md). handler_runner.py is the half on the
loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message

from services.common.kafka.clients import TimeoutDetectingLogger
from services.common.kafka.pace import Pace
from services.common.stage import metrics
from services.common.stage.consumer_close import close_consumer
from services.common.stage.flow_control import FlowControl
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.membership import Membership, OwnershipView
from services.common.stage.offset_committer import OffsetCommitter
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.rebalance_handler import RebalanceHandler
from services.common.stage.record_reader import RecordReader
from services.common.stage.release_queue import ReleaseQueue

__all__ = ["Poller"]

log = structlog.get_logger(__name__)

# The most records of one fetch.
_MAX_BATCH = 500
# All others are seconds. The longest wait of one poll, and of one round without capacity:
_POLL_SECONDS = 0.1
_SATURATED_SECONDS = 0.05
# How long cancelled handlers may take to end before the Consumer is closed without them.
_CANCEL_SECONDS = 2.0
# How long to leave the group may take, beside a revocation that waits for records.
_CLOSE_SECONDS = 10.0
# How long a client's error counts as a problem, unless librdkafka repeats it.
_ERROR_SECONDS = 5.0

# The error of the stage where no `except BaseException` catches one: what librdkafka refuses to a rebalance
# callback, confluent_kafka 2.16 raises as a bare KafkaError, which is no BaseException.
_FAILED_CALLBACK = "a rebalance callback failed"


class Poller:
    """Runs the poller's thread of one stage.

    The thread calls `dispatch` with fetched records, and `cancel` with the assignments to stop working for
    (None: all) and in how many seconds. Both must be thread-safe and may not block. It calls `ended` last,
    with the error that ended it or None. Where librdkafka does not let it end, another thread calls `ended`
    for it. `release`, `stop` and `problems` may be called from any thread.
    """

    def __init__(
        self,
        config: dict[str, Any],
        topics: Sequence[str],
        reader: RecordReader,
        tracker: PartitionTracker,
        *,
        stage: str,
        pace: Pace,
        revoke_seconds: float,
        drain_seconds: float,
        dispatch: Callable[[list[InFlightRecord]], None],
        cancel: Callable[[Collection[Assignment] | None, float], None],
        ended: Callable[[BaseException | None], None],
        view: OwnershipView | None = None,
        consumer: Callable[[dict[str, Any]], Consumer] = Consumer,
    ) -> None:
        self._committer = OffsetCommitter(tracker, stage)
        self._flow_control = FlowControl(tracker, reader, stage)
        self._membership = Membership(topics[0], tracker, self._committer, view, self._on_error)
        self._rebalances = RebalanceHandler(
            tracker,
            reader,
            self._committer,
            self._flow_control,
            self._membership,
            stage=stage,
            revoke_seconds=revoke_seconds,
            wait_until_released=self._wait_until_released,
            cancel=cancel,
            stopping=lambda: self._stopping,
        )
        self._config = config | {
            "error_cb": self._on_error,
            "on_commit": self._committer.on_commit,
            "logger": TimeoutDetectingLogger(self._on_timeout),
        }
        self._topics, self._reader, self._tracker, self._stage = topics, reader, tracker, stage
        self._revoke_seconds, self._drain_seconds = revoke_seconds, drain_seconds
        self._dispatch, self._cancel, self._ended, self._make_consumer = dispatch, cancel, ended, consumer
        self._pace = pace
        self._released = ReleaseQueue()
        self._stopping = False
        self._fatal: KafkaError | None = None
        self._errors: dict[int, tuple[str, float]] = {}
        self._polled_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)
        metrics.STAGE_IN_FLIGHT.labels(stage).set_function(lambda: tracker.in_flight.records)
        metrics.STAGE_IN_FLIGHT_BYTES.labels(stage).set_function(lambda: tracker.in_flight.bytes)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begin to drain: fetch no more, and end once every record is released or time is up."""
        self._stopping = True
        self._released.wake()

    def release(self, records: list[InFlightRecord]) -> None:
        """Take back records that are finished (`finished`) or abandoned. Does not block."""
        self._released.put(records)

    def problems(self) -> list[str]:
        """Return why records may not be coming in, empty where they are."""
        if not self._thread.is_alive():
            return ["the consumer is closed"]
        now = time.monotonic()
        problems = [text for text, until in list(self._errors.values()) if now < until]
        if now - self._polled_at > self._revoke_seconds + 5:
            problems.append(f"the poller has not polled for {now - self._polled_at:.0f} s")
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
        except:  # noqa: E722 - a bare KafkaError is no BaseException
            error = RuntimeError(_FAILED_CALLBACK)
        self._ended(error)

    def _consume(self) -> None:
        """Run one Consumer until the stage stops, or until a new one has to take its place."""
        self._consumer = self._make_consumer(self._config)
        self._committer.use(self._consumer)
        self._flow_control.consumer = self._consumer
        self._membership.use(self._consumer)
        self._consumer.subscribe(
            list(self._topics),
            on_assign=self._rebalances.on_assign,
            on_revoke=self._rebalances.on_revoke,
            on_lost=self._rebalances.on_lost,
        )
        end_with: BaseException | None = RuntimeError(_FAILED_CALLBACK)
        try:
            while not self._stopping:
                self._poll_once()
                if why := self._membership.check(self._polled_at):
                    log.error("the consumer leaves its group to join it anew", stage=self._stage, why=why)
                    end_with = TimeoutError(f"a consumer to be replaced ({why}) did not close")
                    break
            else:
                self._drain()
                end_with = None
        except BaseException as error:
            end_with = error
            raise
        finally:
            self._close(end_with)
        self._rebalances.release_all()

    def _poll_once(self) -> None:
        now = self._polled_at = time.monotonic()
        self._tracker.release(self._released.take())
        self._committer.commit_if_due(now)
        if self._fatal is not None:
            raise KafkaException(self._fatal)
        self._flow_control.resume_due()
        if self._tracker.in_flight.reached():
            self._flow_control.on_saturated(now)
            messages = self._wait_for_capacity()
        else:
            self._flow_control.on_capacity()
            self._flow_control.let_rest(now)
            messages = self._fetch(now)
        if messages:
            self._take_in(messages)

    def _fetch(self, now: float) -> list[Message]:
        wait = self._pace.wait(now)
        if wait:
            time.sleep(wait)
        capacity = self._tracker.in_flight.capacity(_MAX_BATCH)
        first = self._consumer.poll(self._reader.seconds_until_due(_POLL_SECONDS))
        if first is None:
            return []
        messages = [first]
        if capacity > 1:
            messages += self._consumer.consume(capacity - 1, 0)
        self._pace.note_batch(len(messages), time.monotonic(), full=len(messages) == capacity)
        return messages

    def _wait_for_capacity(self) -> list[Message]:
        """Wait a moment for released records. Once all partitions are paused, poll to stay in the group."""
        self._released.wait(_SATURATED_SECONDS)
        if not self._flow_control.all_paused:
            return []
        # A message still comes where it was on its way before the pause.
        first = self._consumer.poll(0)
        return [first] if first is not None else []

    def _take_in(self, messages: list[Message]) -> None:
        batch: list[InFlightRecord] = []
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_error(error)
                continue
            record = self._reader.read(message)
            if record is not None:
                self._tracker.add(record)
                batch.append(record)
        self._flow_control.hold_back()
        if batch:
            self._dispatch(batch)

    def _wait_until_released(self, leaving: Collection[Assignment], deadline: float) -> None:
        """Wait until none of these has a record in flight, or until the deadline. Does not poll meanwhile."""
        while True:
            self._tracker.release(self._released.take())
            left = deadline - time.monotonic()
            if left <= 0 or not any(len(assignment.offsets) for assignment in leaving):
                return
            self._released.wait(min(left, 0.5))

    # --- the end -----------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait for the records in flight, and commit. What stays unfinished stays uncommitted."""
        self._flow_control.pause_all()
        self._poll_until_released(time.monotonic() + self._drain_seconds)
        if self._tracker.in_flight.records:
            log.warning("the drain time is over", unfinished=self._tracker.in_flight.records)
            self._cancel(None, 0)
            self._poll_until_released(time.monotonic() + _CANCEL_SECONDS)
        self._committer.commit_now(self._tracker.owned(), time.monotonic())

    def _poll_until_released(self, deadline: float) -> None:
        while True:
            now = self._polled_at = time.monotonic()
            self._tracker.release(self._released.take())
            self._committer.commit_if_due(now)
            if not self._tracker.in_flight.records or now > deadline:
                return
            messages = self._wait_for_capacity()
            if messages:
                self._take_in(messages)

    def _close(self, end_with: BaseException | None) -> None:
        """Leave the group. If librdkafka does not let it, end the stage with this error, or without one."""

        def on_hang() -> None:
            self._stopping = True
            self._ended(end_with)

        close_consumer(self._consumer, self._tracker.owned, _CLOSE_SECONDS, on_hang)

    # --- trouble -----------------------------------------------------------------------------

    def _on_timeout(self) -> None:
        self._membership.on_trouble(time.monotonic())

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._fatal = error
        now = time.monotonic()
        self._membership.on_trouble(now)
        # librdkafka repeats an error for as long as it lasts.
        if now >= self._errors.get(error.code(), ("", 0.0))[1]:
            log.warning("the consumer reports an error", stage=self._stage, error=error.str())
        self._errors[error.code()] = (error.str(), now + _ERROR_SECONDS)
