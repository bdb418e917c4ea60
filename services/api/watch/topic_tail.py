"""The thread of the live reader: it fetches batches from the ends of the event topics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException, Message

from services.api.watch.event_consumer import EventConsumer
from services.common.config import Settings
from services.common.kafka.pace import Pace
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["TopicTail"]

_MAX_RECORDS = 200
_FETCH_TIMEOUT = 0.25
_FETCH_KBYTES = 8 << 10
# While so many batches wait for the event loop, the thread fetches no more.
_MAX_BATCHES = 4
_PACE = 0.02
_DISCOVERY_INTERVAL = 15.0


class TopicTail:
    """Fetches from the present ends of the topics until `stop`. Made on an event loop, which gets its calls.

    It calls `on_begin(positions, began_ms)` once, before the first batch is in `batches`. All events of a
    task created after `began_ms` (Unix ms) follow. It calls `on_end(error)` where it cannot continue.

    `thread` ends soon after `stop`.
    """

    consumer: EventConsumer
    """Set before `on_begin`. On the event loop only to decode records."""

    def __init__(
        self,
        settings: Settings,
        on_begin: Callable[[dict[TopicPartition, int], int], None],
        on_end: Callable[[BaseException], None],
    ) -> None:
        self.batches: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._settings, self._on_begin, self._on_end = settings, on_begin, on_end
        self._loop = asyncio.get_running_loop()
        self._free_batches = threading.Semaphore(_MAX_BATCHES)
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    def batch_done(self) -> None:
        """Let the thread fetch another batch, once one of `batches` is handled."""
        self._free_batches.release()

    def stop(self) -> None:
        """Stop fetching, and call nobody any more."""
        self._stopping = True

    def _run(self) -> None:
        try:
            self.consumer = EventConsumer(
                self._settings, self._on_client_error, _FETCH_KBYTES, report_ends=False
            )
            try:
                self._read()
            finally:
                self.consumer.close()
        except Exception as error:
            self._post(self._on_end, error)

    def _read(self) -> None:
        consumer, pace = self.consumer, Pace(_PACE)
        positions = consumer.end_offsets(consumer.partitions())
        # The clock is read after the ends, so that all events of a task created later are read.
        began_ms = int(time.time() * 1000)
        assigned = set(positions)
        consumer.consumer.assign(
            [consumer.native(partition, offset) for partition, offset in positions.items()]
        )
        self._post(self._on_begin, positions, began_ms)
        discovered_at = time.monotonic()
        while not self._stopping:
            if not self._free_batches.acquire(timeout=_FETCH_TIMEOUT):
                continue
            batch: list[Message] = []
            while not batch and not self._stopping:
                if time.monotonic() - discovered_at > _DISCOVERY_INTERVAL:
                    self._assign_new_partitions(assigned)
                    discovered_at = time.monotonic()
                if wait := pace.wait(time.monotonic()):
                    time.sleep(wait)
                batch = _without_errors(consumer.fetch(_MAX_RECORDS, _FETCH_TIMEOUT))
            pace.note_batch(len(batch), time.monotonic(), full=len(batch) == _MAX_RECORDS)
            self._post(self.batches.put_nowait, batch)

    def _assign_new_partitions(self, assigned: set[TopicPartition]) -> None:
        """Read partitions that were added meanwhile, from their beginning."""
        try:
            new = [partition for partition in self.consumer.partitions() if partition not in assigned]
        except KafkaException:
            return
        if new:
            self.consumer.consumer.incremental_assign(
                [self.consumer.native(partition, 0) for partition in new]
            )
            assigned.update(new)

    def _on_client_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._post(self._on_end, KafkaException(error))

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        # The process may have closed the loop already.
        if not self._stopping and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _without_errors(fetched: list[Message]) -> list[Message]:
    """Return the records; raise KafkaException where unread records were deleted."""
    messages = []
    for message in fetched:
        error = message.error()
        if error is None:
            messages.append(message)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise KafkaException(error)
    return messages
