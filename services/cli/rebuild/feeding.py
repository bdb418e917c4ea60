"""The topics into the rebuilt tables: one thread reads and folds in memory, two others write. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from confluent_kafka import Message
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from services.cli.rebuild.folding import Folded
from services.cli.rebuild.writing import write
from services.cli.topic_log import At, Log
from services.common.config import Settings
from services.common.database.errors import is_database_fault
from services.common.database.transactions import transaction
from services.common.events import DECODERS, Undecodable
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["Feed"]

# Events a transaction, and the bytes of their records at most: both are in memory three times over.
_BATCH, _BATCH_BYTES = 5000, 4 << 20
# Rows are held back up to so many, since most of a task's events are still to come.
_ROWS = 20_000
# So many events may be left to be folded while everybody waits; so often it is tried to get there.
_FEW, _ROUNDS = 500, 20


class Feed:
    """Reads all event topics once. `advance` is told how many more events were read.

    `undecodable` counts records that are no events, `refused` are tasks whose data the database does not
    take. Raises `confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
    """

    def __init__(self, settings: Settings, engine: Engine, advance: Callable[[int], None]) -> None:
        names = Names(settings.topic_prefix)
        self._decoders = {names.topic(topic): DECODERS[topic] for topic in EVENT_TOPICS}
        self._engine, self._advance = engine, advance
        self.log = Log(settings, list(self._decoders))
        # Rows and all else go to different tables, so neither waits for the other.
        self._rows, self._rest = _Lane(self._write), _Lane(self._write)
        self.events = 0
        self.undecodable = 0
        self.refused: set[bytes] = set()

    def close(self) -> None:
        """Wait for what is being written; let go of the connections."""
        self._rows.close()
        self._rest.close()
        self.log.close()

    def fold(self, ends: Mapping[At, int]) -> None:
        """Fold up to `ends`."""
        for folded in self.batches(ends, _ROWS):
            self._rows.put(folded.rows_alone())
            self._rest.put(folded.without_rows())
        self._rows.join()
        self._rest.join()

    def catch_up(self) -> None:
        """Fold what is there by now, until little is left."""
        for _ in range(_ROUNDS):
            ends = self.log.ends()
            left = self.log.left(ends)
            if left:
                self.fold(ends)
            if left < _FEW:
                return

    def batches(self, ends: Mapping[At, int], held: int = 0) -> Iterator[Folded]:
        """Yield what lies before `ends`, folded. Up to `held` rows are held back for the batches to come."""
        folded, events, size = Folded(), 0, 0
        for messages in self.log.read(ends, 1000):
            for message in messages:
                self._add(folded, message)
                size += len(message.value() or b"")
            events += len(messages)
            self._advance(len(messages))
            if events >= _BATCH or size >= _BATCH_BYTES:
                rest = folded.without_rows() if len(folded.rows) < held else folded
                folded = folded.rows_alone() if rest is not folded else Folded()
                yield rest
                events, size = 0, 0
        yield folded

    def _add(self, folded: Folded, message: Message) -> None:
        try:
            folded.add(self._decoders[message.topic() or ""](message.value()))
            self.events += 1
        except Undecodable:
            self.undecodable += 1

    def _write(self, folded: Folded) -> None:
        try:
            transaction(self._engine, lambda connection: write(connection, folded))
        except DBAPIError as error:
            # As the status stage has it: the database says of one task's data that it cannot be stored.
            if is_database_fault(error):
                raise
            tasks = folded.tasks()
            if len(tasks) < 2:
                self.refused.update(tasks)
                return
            for half in folded.halves():
                self._write(half)


class _Lane:
    """Writes one batch after the other, as the first of two events in one version stays."""

    def __init__(self, write: Callable[[Folded], None]) -> None:
        self._write, self._thread = write, ThreadPoolExecutor(1, "lane")
        self._before: Future[None] | None = None

    def put(self, folded: Folded) -> None:
        """Have this written too. Blocks while another one is; raises what became of that."""
        if folded.tasks():
            self.join()
            self._before = self._thread.submit(self._write, folded)

    def join(self) -> None:
        """Return once all is written; raises what became of it."""
        if self._before is not None:
            self._before.result()

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(cancel_futures=True)
