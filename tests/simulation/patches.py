"""Replaces names in the services' modules by the in-memory ports, within a block.

All that these names stand for calls a server, blocks, or reads a clock. Nothing else is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from postroad.v1 import task_pb2
from services.api import (
    cancelling,
    database_threads,
    decider,
    locked_task,
    outbox,
    outbox_publisher,
    outbox_sweeper,
    recorder,
    resolving,
)
from services.api.uuid7 import text
from services.common import batching, taskstore
from services.common.fold import delta
from services.common.stage import (
    consumer_close,
    delay_rests,
    membership,
    offset_committer,
    poller,
    rebalance_handler,
    record_reader,
    release_queue,
    runtime,
)
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.partition_tracker import PartitionTracker
from services.common.timeline import timeline_row
from services.sender import async_claims, cleanup, store_outcome
from services.status import stage as status_stage
from tests.simulation.cluster_check import ClusterCheck
from tests.simulation.database import Database
from tests.simulation.loop import Executor
from tests.simulation.poller import Poller
from tests.simulation.publisher import Publisher
from tests.simulation.scheduler import here
from tests.simulation.threads import VirtualTime

__all__ = ["installed", "replaced"]


class _Log:
    """Replaces a module's logger, and writes into the trace if there is one."""

    world: Any = None

    def _write(self, event: str, **values: object) -> None:
        if _Log.world is not None and _Log.world.lines is not None:
            more = " ".join(f"{name}={value}" for name, value in values.items() if name != "exc_info")
            error = values.get("exc_info")
            _Log.world.trace("log", f"{event} {more}" + (f" {error!r}" if error is not None else ""))

    debug = info = warning = error = exception = _write


def _add(tracker: PartitionTracker, record: InFlightRecord) -> None:
    _ORIGINAL_ADD(tracker, record)
    # The consumer checks the commits, so it must know the record too.
    consumer = tracker.consumer  # type: ignore[attr-defined]
    place = record.assignment.topic, record.assignment.partition
    consumer.taken.setdefault(place, []).append(record)


_ORIGINAL_ADD = PartitionTracker.add


def _originals(connection: Database, ids: Any) -> dict[bytes, task_pb2.Task]:
    return {id_: task_pb2.Task(id=text(id_)) for id_ in ids}


def _view(connection: Database, id_: bytes) -> task_pb2.Task:
    return task_pb2.Task(id=text(id_), status=connection.tasks[id_].status)


def _merge_events(connection: Database, events: Any) -> None:
    connection.upsert(map(delta, events))


def _insert_timeline(connection: Database, events: Any) -> None:
    connection.insert_events(map(timeline_row, events))


def _transaction(engine: Database, work: Any) -> Any:
    return engine.transact(work)


_STATEMENTS = (
    *("upsert", "insert_events", "insert_bodies", "owners_of_keys"),
    *("load_tasks", "send_times", "sizes_of_bodies", "load_events", "load_epoch"),
)
_REPLACED: list[tuple[Any, str, Any]] = [
    (poller, "time", VirtualTime),
    (membership, "time", VirtualTime),
    (poller, "threading", VirtualTime),
    (release_queue, "threading", VirtualTime),
    (consumer_close, "time", VirtualTime),
    (consumer_close, "threading", VirtualTime),
    (offset_committer, "time", VirtualTime),
    (rebalance_handler, "time", VirtualTime),
    (record_reader, "time", VirtualTime),
    (batching, "WorkerThreads", Executor),
    (async_claims, "ThreadPoolExecutor", Executor),
    # A waiting poller is woken when there is something to do (poller.py).
    (poller, "_POLL_SECONDS", 1e9),
    (poller, "_SATURATED_SECONDS", 1.0),
    # A poller that waits does not look at delay topics now and then: they never rest.
    (delay_rests, "_LONG_LOOK", 1e9),
    (runtime, "Poller", Poller),
    (runtime, "Publisher", Publisher),
    (runtime, "ClusterCheck", ClusterCheck),
    (decider, "time", VirtualTime),
    (database_threads, "ThreadPoolExecutor", Executor),
    (database_threads, "transaction", _transaction),
    (recorder, "transaction", _transaction),
    (outbox_sweeper, "transaction", _transaction),
    (status_stage, "transaction", _transaction),
    (status_stage, "merge_events", _merge_events),
    (status_stage, "insert_timeline", _insert_timeline),
    (status_stage, "store_failures", Database.store_failures),
    (recorder, "tasks_of", _originals),
    (locked_task, "lock_row", Database.lock_row),
    (locked_task, "lock_rows", Database.lock_rows),
    (locked_task, "view", _view),
    (cancelling, "store_rows", Database.store_rows),
    (cancelling, "insert_row", Database.insert_row),
    (resolving, "store_rows", Database.store_rows),
    (resolving, "insert_row", Database.insert_row),
    *((taskstore, name, getattr(Database, name)) for name in _STATEMENTS),
    *(
        (outbox, name, getattr(Database, name))
        for name in ("put", "insert_scheduled", "delete", "take", "next_due", "defer", "make_due")
    ),
]
_LOGGING = (
    *(
        "services.common.stage." + name
        for name in (
            "batch_runner",
            "consumer_close",
            "handler_runner",
            "offset_committer",
            "poller",
            "rebalance_handler",
            "republisher",
            "runtime",
        )
    ),
    *(
        module.__name__
        for module in (
            *(database_threads, recorder, outbox_publisher, outbox_sweeper),
            *(status_stage, async_claims, cleanup, store_outcome),
        )
    ),
    "services.sender.leases",
    "services.validator.stage",
)


@contextlib.contextmanager
def replaced(names: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace these attributes of modules and classes within the block."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in names]
    for owner, name, value in names:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Install the in-memory ports within the block."""
    log = _Log()
    loggers: list[tuple[ModuleType, str, Any]] = [
        (importlib.import_module(name), "log", log) for name in _LOGGING
    ]
    state = random.getstate()
    with replaced([*_REPLACED, *loggers, (PartitionTracker, "add", _add)]):
        yield
    random.setstate(state)


def trace_into(world: Any) -> None:
    """Write the services' log lines into this world's trace."""
    _Log.world = world
    # The jitter of retries draws from the global generator, and must repeat itself too.
    random.seed(here().rng.random())
