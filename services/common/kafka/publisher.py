"""Produces batches of records to Kafka, and says of each batch which records were not acked.

It replaces a producer that delivers nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.common.config import Settings
from services.common.kafka.clients import producer_config
from services.common.kafka.pace import Pace, awaited_records
from services.common.kafka.records import OutgoingRecord

__all__ = ["PublishFailure", "Publisher", "is_permanent", "produce_error"]

log = structlog.get_logger(__name__)

PublishFailure = tuple[int, KafkaError]
"""The index of a record in its batch, and why it was not delivered."""

_PERMANENT = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_MSG,
        KafkaError._INVALID_ARG,
    }
)
# Seconds that one poll of the producer may take.
_POLL_SECONDS = 0.1
# After so many polls with nothing to be acked, the thread sleeps until there is something. It looks every
# few seconds all the same, for the producer may report an error.
_IDLE_POLLS = 10
_SLEEP_SECONDS = 5.0
# How many polls a purged producer gets to report what it held; it does so at once.
_FLUSHES = 50
_NO_OFFSET = KafkaError(KafkaError._BAD_MSG, "acked without an offset, perhaps never written")


def is_permanent(error: KafkaError) -> bool:
    """Return whether Kafka would refuse the same record every time."""
    return error.code() in _PERMANENT


def produce_error(error: Exception) -> KafkaError:
    """Return what `Producer.produce` raised as a KafkaError."""
    if isinstance(error, KafkaException):
        found: KafkaError = error.args[0]
        return found
    return KafkaError(KafkaError._INVALID_ARG, f"{type(error).__name__}: {error}")


class _Batch:
    """Counts what is still to be acked of one batch. Once it is sent, only the poll thread changes it."""

    __slots__ = ("_on_complete", "count", "failures", "left", "on_done")

    def __init__(
        self,
        count: int,
        on_done: Callable[[list[PublishFailure]], None],
        on_complete: Callable[[_Batch], None],
    ) -> None:
        self.count = self.left = count
        self.on_done = on_done
        self.failures: list[PublishFailure] = []
        self._on_complete = on_complete

    def on_delivery(self, index: int, error: KafkaError | None, message: Message | None) -> None:
        # librdkafka takes a batch for delivered where a later one of its partition was. But a broker that
        # does not know the producer yet takes any first batch; the earlier one, refused a moment ago, is
        # then never sent again. Only a record that a broker has written has an offset.
        if error is None and (message is None or message.offset() is None):
            error = _NO_OFFSET
        if error is not None:
            self.failures.append((index, error))
        self.left -= 1
        if not self.left:
            self._on_complete(self)


class Publisher:
    """One idempotent producer and the thread that polls it. Use it from one event loop.

    A record goes to `settings.topic_prefix` + its topic, in the order of the calls. A batch is not atomic.
    One that is published again after a failure may be on Kafka twice: readers tell events apart by `ce_id`.
    The callers bound how much is being published. At a high rate batches are gathered for a moment, since
    librdkafka makes a request for every partition, whatever it holds.

    The publisher replaces a producer that fails for good, as one that lost count of its batches in a long
    outage. It also replaces one whose deliveries time out without a single ack meanwhile. After brokers were
    killed and frozen in turn, librdkafka was seen to deliver nothing more to brokers that took the records
    of others.
    """

    def __init__(
        self, settings: Settings, client_id: str, *, pace: Pace | None = None, **overrides: Any
    ) -> None:
        """`pace` is that of records for which a task waits, unless another one is given.

        `overrides` are librdkafka settings that replace those of `producer_config`.
        """
        self._prefix = settings.topic_prefix
        self._config = producer_config(settings, client_id) | {"error_cb": self._on_error} | overrides
        self._waiting: deque[tuple[OutgoingRecord, Callable[..., None]]] = deque()
        self._pace = pace or awaited_records()
        self._timer: asyncio.TimerHandle | None = None
        self._refused: deque[Callable[[], None]] = deque()
        self._complete: deque[_Batch] = deque()
        self._reporting = False
        self._closed = False
        self._sleeping = False
        self._wake = threading.Event()
        # A purged producer never reports what is produced to it afterwards.
        self._replacing = threading.Lock()
        self._deadline = 0.0
        self._failed: KafkaError | None = None
        self._delivery_timeout = self._config["delivery.timeout.ms"] / 1000
        self._acked_at = time.monotonic()

    def start(self) -> None:
        """Start the producer. Call on the loop's thread; it neither blocks nor waits for a broker."""
        self._loop = asyncio.get_running_loop()
        self._producer = Producer(self._config)
        self._thread = threading.Thread(target=self._poll, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, batch: Sequence[OutgoingRecord]) -> asyncio.Future[list[PublishFailure]]:
        """Publish a batch. The result has its failures, empty once all in-sync replicas acked every record.

        It comes within `delivery.timeout.ms`.
        """
        future: asyncio.Future[list[PublishFailure]] = self._loop.create_future()

        def on_done(failures: list[PublishFailure]) -> None:
            if not future.done():
                future.set_result(failures)

        self.send(batch, on_done)
        return future

    def send(self, batch: Sequence[OutgoingRecord], on_done: Callable[[list[PublishFailure]], None]) -> None:
        """Publish a batch, and call `on_done` once on the loop with its failures. Does not block."""
        if not batch:
            self._loop.call_soon(on_done, [])
            return
        on_delivery = _Batch(len(batch), on_done, self._on_complete).on_delivery
        self._waiting.extend((record, partial(on_delivery, index)) for index, record in enumerate(batch))
        if self._timer is None:
            wait = self._pace.wait(time.monotonic())
            if wait:
                self._timer = self._loop.call_later(wait, self._produce)
            else:
                self._produce()

    async def close(self, seconds: float) -> bool:
        """Wait up to `seconds` for what is being published, then stop. Return whether all was acked."""
        self._produce()
        self._deadline = time.monotonic() + seconds
        self._closed = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, seconds + 1)
        return not self._waiting and len(self._producer) == 0

    def _produce(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        prefix, waiting = self._prefix, self._waiting
        count = len(waiting)
        with self._replacing:
            produce = self._producer.produce
            while waiting:
                record, on_delivery = waiting[0]
                try:
                    produce(
                        prefix + record.topic,
                        record.value,
                        record.key,
                        on_delivery=on_delivery,
                        headers=record.headers,  # type: ignore[arg-type]
                    )
                except BufferError:
                    # The producer's own queue is full; the next deliveries make room in it.
                    break
                except Exception as error:
                    # A record that stayed at the head of the queue would hold up all others.
                    self._refused.append(partial(on_delivery, produce_error(error), None))
                waiting.popleft()
        self._pace.note_batch(count - len(waiting), time.monotonic())
        if self._sleeping:
            self._wake.set()

    def _poll(self) -> None:
        idle = 0
        while not self._closed:
            self._call(lambda: self._producer.poll(_POLL_SECONDS))
            if self._failed is not None:
                self._replace_producer(self._failed)
            self._report()
            idle = 0 if self._has_work() else idle + 1
            if idle >= _IDLE_POLLS:
                self._sleep()
        self._call(lambda: self._producer.flush(max(0.0, self._deadline - time.monotonic())))
        self._report()

    def _sleep(self) -> None:
        """Wait until something is produced, for a few seconds at most."""
        self._wake.clear()
        self._sleeping = True
        # What was produced before this line did not wake anybody.
        if not self._has_work() and not self._closed:
            self._wake.wait(_SLEEP_SECONDS)
        self._sleeping = False

    def _has_work(self) -> bool:
        return bool(self._waiting or self._refused) or len(self._producer) > 0

    def _call(self, call: Callable[[], int]) -> None:
        """Call the producer. It raises a fatal error once and does not pass it to `error_cb`."""
        try:
            call()
        except KafkaException as error:
            self._on_error(error.args[0])

    def _replace_producer(self, error: KafkaError) -> None:
        """Put a new producer in the place of one that failed; all that the old one held has failed."""
        try:
            new = Producer(self._config)
        except KafkaException as problem:
            # Threads or memory are short: until there are more, the old producer refuses what it gets.
            log.error("no new producer can be made", error=str(problem))
            time.sleep(_POLL_SECONDS)
            return
        log.error("the producer failed and is replaced", error=str(error))
        self._failed = None
        with self._replacing:
            old, self._producer = self._producer, new
        old.purge()
        for _ in range(_FLUSHES):
            self._call(lambda: old.flush(_POLL_SECONDS))
            if not len(old):
                break
        self._failed = None
        self._acked_at = time.monotonic()
        # The new one may fail at once again.
        time.sleep(_POLL_SECONDS)

    def _report(self) -> None:
        while self._refused:
            self._refused.popleft()()
        # Records that wait for room in the producer's queue have no delivery of their own to wake them.
        if (self._complete or self._waiting) and not self._reporting:
            self._reporting = True
            try:
                self._loop.call_soon_threadsafe(self._on_report)
            except RuntimeError:
                log.warning("deliveries came after the loop had ended", batches=len(self._complete))

    def _on_report(self) -> None:
        # From here on a batch that completes calls again.
        self._reporting = False
        if self._waiting and self._timer is None:
            self._produce()
        while self._complete:
            batch = self._complete.popleft()
            try:
                batch.on_done(batch.failures)
            except Exception:
                log.exception("the callback of a batch failed")

    def _on_complete(self, batch: _Batch) -> None:
        self._complete.append(batch)
        if len(batch.failures) < batch.count:
            self._acked_at = time.monotonic()
            return
        _, error = batch.failures[0]
        timed_out = error.code() == KafkaError._MSG_TIMED_OUT
        if timed_out and time.monotonic() - self._acked_at > self._delivery_timeout:
            self._failed = error

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._FATAL or error.fatal():
            self._failed = error
