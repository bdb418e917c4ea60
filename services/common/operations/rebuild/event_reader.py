"""Reads the event topics into the shadow tables. One thread reads and folds, two others write. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from confluent_kafka import Message
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from services.common.config import Settings
from services.common.database.errors import is_database_fault
from services.common.database.transactions import transaction
from services.common.events import DECODERS, Undecodable
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.operations.rebuild.folded_batch import FoldedBatch
from services.common.operations.rebuild.writer import write
from services.common.operations.topic_reader import TopicReader

__all__ = ["EventReader"]

# The most events of a transaction, and bytes of their records. Up to three batches are in memory at a time.
_BATCH, _BATCH_BYTES = 5000, 4 << 20
# Up to so many rows wait in memory, since most of a task's events are still to come.
_ROWS = 20_000
# A catch-up ends when so few events are left, which a swap can fold while all writers wait, or after so many
# rounds.
_FEW, _ROUNDS = 500, 20


class EventReader:
    """Reads all event topics once, from start to end. `advance` gets the number of records of each read.

    `events` counts the decoded records and `undecodable` the others. `refused` holds the ids of tasks whose
    data the database refuses. Raises `confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
    """

    def __init__(self, settings: Settings, engine: Engine, advance: Callable[[int], None]) -> None:
        names = Names(settings.topic_prefix)
        self._decoders = {names.topic(topic): DECODERS[topic] for topic in EVENT_TOPICS}
        self._engine, self._advance = engine, advance
        self.topics = TopicReader(settings, list(self._decoders))
        # Rows and the rest go to different tables, so that neither waits for the other.
        self._rows, self._rest = _WriterThread(self._write), _WriterThread(self._write)
        self.events = 0
        self.undecodable = 0
        self.refused: set[bytes] = set()

    def close(self) -> None:
        """Wait for the writes in progress, then close the connections."""
        self._rows.close()
        self._rest.close()
        self.topics.close()

    def fold(self, ends: Mapping[TopicPartition, int]) -> None:
        """Fold and write all records before `ends`."""
        for folded in self.batches(ends, _ROWS):
            self._rows.put(folded.rows_only())
            self._rest.put(folded.without_rows())
        self._rows.join()
        self._rest.join()

    def catch_up(self) -> None:
        """Fold and write what arrived meanwhile, until little is left."""
        for _ in range(_ROUNDS):
            ends = self.topics.ends()
            left = self.topics.left(ends)
            if left:
                self.fold(ends)
            if left < _FEW:
                return

    def batches(self, ends: Mapping[TopicPartition, int], held: int = 0) -> Iterator[FoldedBatch]:
        """Yield all records before `ends` in folded batches. Up to `held` rows wait for the next batches."""
        folded, events, size = FoldedBatch(), 0, 0
        for messages in self.topics.read(ends, 1000):
            for message in messages:
                self._add(folded, message)
                size += len(message.value() or b"")
            events += len(messages)
            self._advance(len(messages))
            if events >= _BATCH or size >= _BATCH_BYTES:
                rest = folded.without_rows() if len(folded.rows) < held else folded
                folded = folded.rows_only() if rest is not folded else FoldedBatch()
                yield rest
                events, size = 0, 0
        yield folded

    def _add(self, folded: FoldedBatch, message: Message) -> None:
        try:
            folded.add(self._decoders[message.topic() or ""](message.value()))
            self.events += 1
        except Undecodable:
            self.undecodable += 1

    def _write(self, folded: FoldedBatch) -> None:
        try:
            transaction(self._engine, lambda connection: write(connection, folded))
        except DBAPIError as error:
            # As in the status stage, the database may refuse the data of a single task.
            if is_database_fault(error):
                raise
            tasks = folded.tasks()
            if len(tasks) < 2:
                self.refused.update(tasks)
                return
            for half in folded.halves():
                self._write(half)


class _WriterThread:
    """Writes one batch after the other, since the first of two events in one version stays."""

    def __init__(self, write: Callable[[FoldedBatch], None]) -> None:
        self._write, self._thread = write, ThreadPoolExecutor(1, "rebuild-writer")
        self._before: Future[None] | None = None

    def put(self, folded: FoldedBatch) -> None:
        """Start to write a batch. Blocks while the one before is written, and raises that one's error."""
        if folded.tasks():
            self.join()
            self._before = self._thread.submit(self._write, folded)

    def join(self) -> None:
        """Return once all batches are written. Raises the last one's error."""
        if self._before is not None:
            self._before.result()

    def close(self) -> None:
        """Wait for the write in progress."""
        self._thread.shutdown(cancel_futures=True)
