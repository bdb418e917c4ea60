"""Producing to Kafka: batches in, one answer a batch out."""

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
from services.common.kafka.pace import LONGEST_PRODUCE_WAIT, Pace
from services.common.kafka.records import OutgoingRecord

__all__ = ["PublishFailure", "Publisher", "is_permanent", "produce_error"]

log = structlog.get_logger(__name__)

PublishFailure = tuple[int, KafkaError]
"""An item's index in its batch, and why it was not delivered."""

_HOPELESS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_MSG,
        KafkaError._INVALID_ARG,
    }
)
_TURN = 0.1
# Turns that a purged producer has to answer for what it held: it does so at once.
_FLUSHES = 50
_UNPROVEN = KafkaError(KafkaError._BAD_MSG, "acked without an offset, perhaps never written")


def is_permanent(error: KafkaError) -> bool:
    """Return whether the same record would be refused every time."""
    return error.code() in _HOPELESS


def produce_error(error: Exception) -> KafkaError:
    """Return why the client did not take a record: what `Producer.produce` raised, as Kafka's own error."""
    if isinstance(error, KafkaException):
        found: KafkaError = error.args[0]
        return found
    return KafkaError(KafkaError._INVALID_ARG, f"{type(error).__name__}: {error}")


class _Batch:
    """What is still to be acked of one batch. Only the poll thread changes it once it is sent."""

    __slots__ = ("_finished", "count", "done", "failures", "left")

    def __init__(
        self, count: int, done: Callable[[list[PublishFailure]], None], finished: Callable[[_Batch], None]
    ) -> None:
        self.count = self.left = count
        self.done = done
        self.failures: list[PublishFailure] = []
        self._finished = finished

    def delivered(self, index: int, error: KafkaError | None, message: Message | None) -> None:
        # librdkafka takes a batch for delivered where a later one of its partition was. But a broker that
        # does not know the producer yet takes any first batch, and then the earlier one, refused a moment
        # ago, is never sent again. Only what a broker has written has an offset.
        if error is None and (message is None or message.offset() is None):
            error = _UNPROVEN
        if error is not None:
            self.failures.append((index, error))
        self.left -= 1
        if not self.left:
            self._finished(self)


class Publisher:
    """One idempotent producer and its poll thread. To be used from one event loop.

    Items go to `settings.topic_prefix` + their topic, in the order of the calls. A batch is not atomic, and
    one that is published again after a failure may be there twice: readers tell events by `ce_id`. What is
    being published is bounded by the callers. When there is much of it, batches are gathered for a moment:
    librdkafka makes one request for every partition, whatever it holds. A producer that fails for good (it
    lost count of its batches in a long outage, say) is replaced, and so is one that has let deliveries time
    out without a single ack meanwhile: after brokers were killed and frozen in turn librdkafka was seen to
    deliver nothing more, to brokers that took others' records.
    """

    def __init__(self, settings: Settings, client_id: str, **overrides: Any) -> None:
        """`overrides` are librdkafka settings that replace those of `producer_config`."""
        self._prefix = settings.topic_prefix
        self._config = producer_config(settings, client_id) | {"error_cb": self._on_error} | overrides
        self._waiting: deque[tuple[OutgoingRecord, Callable[..., None]]] = deque()
        self._pace = Pace(LONGEST_PRODUCE_WAIT)
        self._timer: asyncio.TimerHandle | None = None
        self._refused: deque[Callable[[], None]] = deque()
        self._finished: list[_Batch] = []
        self._closed = False
        # What is produced to a producer that was purged is never answered for.
        self._changing = threading.Lock()
        self._deadline = 0.0
        self._gave_up: KafkaError | None = None
        self._patience = self._config["delivery.timeout.ms"] / 1000
        self._acked_at = time.monotonic()

    def start(self) -> None:
        """Start producing. Call on the loop's thread; does not block, nor wait for a broker."""
        self._loop = asyncio.get_running_loop()
        self._producer = Producer(self._config)
        self._thread = threading.Thread(target=self._poll, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, batch: Sequence[OutgoingRecord]) -> asyncio.Future[list[PublishFailure]]:
        """Publish a batch; the result is the failed items, empty once all are acked by all in-sync replicas.

        It comes after `delivery.timeout.ms` at the latest.
        """
        future: asyncio.Future[list[PublishFailure]] = self._loop.create_future()

        def done(failures: list[PublishFailure]) -> None:
            if not future.done():
                future.set_result(failures)

        self.send(batch, done)
        return future

    def send(self, batch: Sequence[OutgoingRecord], done: Callable[[list[PublishFailure]], None]) -> None:
        """Like `attempt`, but `done` is called once on the loop, with the failed items. Does not block."""
        if not batch:
            self._loop.call_soon(done, [])
            return
        delivered = _Batch(len(batch), done, self._finished_one).delivered
        self._waiting.extend((item, partial(delivered, index)) for index, item in enumerate(batch))
        if self._timer is None:
            wait = self._pace.wait(time.monotonic())
            if wait:
                self._timer = self._loop.call_later(wait, self._produce)
            else:
                self._produce()

    async def close(self, seconds: float) -> bool:
        """Wait up to `seconds` for what is being published, then stop. Returns whether all was acked."""
        self._produce()
        self._deadline = time.monotonic() + seconds
        self._closed = True
        await asyncio.to_thread(self._thread.join, seconds + 1)
        return not self._waiting and len(self._producer) == 0

    def _produce(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        prefix, waiting = self._prefix, self._waiting
        count = len(waiting)
        with self._changing:
            produce = self._producer.produce
            while waiting:
                item, delivered = waiting[0]
                try:
                    produce(
                        prefix + item.topic,
                        item.value,
                        item.key,
                        on_delivery=delivered,
                        headers=item.headers,  # type: ignore[arg-type]
                    )
                except BufferError:
                    # The producer's own queue is full: the next answers make room.
                    break
                except Exception as error:
                    # Left in front of the queue it would hold up all others.
                    self._refused.append(partial(delivered, produce_error(error), None))
                waiting.popleft()
        self._pace.note_batch(count - len(waiting), time.monotonic())

    def _poll(self) -> None:
        while not self._closed:
            self._heed(lambda: self._producer.poll(_TURN))
            if self._gave_up is not None:
                self._renew(self._gave_up)
            self._report()
        self._heed(lambda: self._producer.flush(max(0.0, self._deadline - time.monotonic())))
        self._report()

    def _heed(self, call: Callable[[], int]) -> None:
        """A fatal error is raised once, not told to `error_cb`; the calls after it answer what is left."""
        try:
            call()
        except KafkaException as error:
            self._on_error(error.args[0])

    def _renew(self, error: KafkaError) -> None:
        """Put a new producer in the place of one that gave up; what that one held has failed."""
        try:
            fresh = Producer(self._config)
        except KafkaException as problem:
            # No threads, no memory: the spent one stays, and refuses what it is given, until there is.
            log.error("no new producer can be made", error=str(problem))
            time.sleep(_TURN)
            return
        log.error("the producer gave up, a new one takes its place", error=str(error))
        self._gave_up = None
        with self._changing:
            spent, self._producer = self._producer, fresh
        spent.purge()
        for _ in range(_FLUSHES):
            self._heed(lambda: spent.flush(_TURN))
            if not len(spent):
                break
        self._gave_up = None
        self._acked_at = time.monotonic()
        # It may give up at once again.
        time.sleep(_TURN)

    def _report(self) -> None:
        while self._refused:
            self._refused.popleft()()
        # What waits for the producer's queue has no delivery of its own to be woken by.
        if self._finished or self._waiting:
            finished, self._finished = self._finished, []
            try:
                self._loop.call_soon_threadsafe(self._answer, finished)
            except RuntimeError:
                log.warning("deliveries came after the loop had ended", batches=len(finished))

    def _answer(self, finished: list[_Batch]) -> None:
        if self._waiting and self._timer is None:
            self._produce()
        for batch in finished:
            try:
                batch.done(batch.failures)
            except Exception:
                log.exception("a batch's answer was not taken")

    def _finished_one(self, batch: _Batch) -> None:
        self._finished.append(batch)
        if len(batch.failures) < batch.count:
            self._acked_at = time.monotonic()
            return
        _, error = batch.failures[0]
        deaf = error.code() == KafkaError._MSG_TIMED_OUT
        if deaf and time.monotonic() - self._acked_at > self._patience:
            self._gave_up = error

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._FATAL or error.fatal():
            self._gave_up = error
