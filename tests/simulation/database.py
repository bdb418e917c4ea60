"""MySQL in memory: the claims by the rules of decide.py, the outbox, and the task tables that status folds.

patches.py replaces the statements of taskstore.py and outbox.py one by one. The services' own code calls
them, in its own transactions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy.exc import OperationalError

from postroad.v1 import events_pb2 as pb
from services.api.outbox import GRACE, SWEEP_SECONDS, OutboxRow
from services.common.database.times import to_micros
from services.common.deliveries import decide as rules
from services.common.deliveries import settlement as fence
from services.common.deliveries.decide import Cancel, Claim, ClaimAnswer, Delivery, Taken
from services.common.deliveries.mx_failures import failed_row, merge_failure
from services.common.deliveries.settlement import Settlement
from services.common.events import CREATED_KEY
from services.common.fold import TaskRow, merge
from services.common.taskstore import Body
from services.common.timeline import TimelineRow
from tests.simulation.threads import VirtualTime
from tests.simulation.world import World

__all__ = ["Database", "MemoryClaims"]

R = TypeVar("R")
_BEGIN = datetime(2027, 1, 15, 8)


class _Gone(Exception):
    """The error that the driver raises on a lost connection."""

    errno = 2013


def _lost() -> OperationalError:
    return OperationalError("", None, _Gone("lost connection"))


class Database:
    """All tables. A call takes effect at once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deliveries: dict[bytes, Delivery] = {}
        self.sent_by: dict[bytes, Settlement] = {}
        """The result of each settle as sent, by owner token."""
        self.outbox: dict[OutboxRow, float] = {}
        self.tasks: dict[bytes, TaskRow] = {}
        self.keys: dict[tuple[str, bytes], bytes] = {}
        self.bodies: dict[bytes, Body] = {}
        self.entries: dict[tuple[bytes, str], TimelineRow] = {}
        self.outbox_changed: list[Callable[[], None]] = []

    def now(self) -> datetime:
        """Return the database's clock."""
        return _BEGIN + timedelta(seconds=self.world.now)

    def at(self, time: datetime) -> float:
        """Return the virtual seconds at which the database's clock shows `time`."""
        return (time - _BEGIN).total_seconds()

    def transact(self, work: Callable[[Database], R], operation: str | None = None) -> R:
        """Replace `transaction`: do all of `work`, or raise OperationalError."""
        if not self.world.up("database"):
            raise _lost()
        actor = self.world.scheduler.actor
        kind = operation or f"{actor.service if actor else '-'}.db"
        verdict = self.world.operation(kind, actor)
        if verdict == "refused":
            raise _lost()
        result = work(self)
        if kind == "status.db":
            self._check_hidden()
        if verdict == "again":
            # The connection broke during the commit, and `transaction` repeated the work.
            result = work(self)
        if verdict == "unheard":
            raise _lost()
        return result

    def _check_hidden(self) -> None:
        """Record a violation where a late verdict hides that the sender will try again."""
        for id_, row in self.tasks.items():
            delivery = self.deliveries.get(id_)
            deferred = delivery is not None and delivery.state == "deferred" and delivery.epoch == row.epoch
            if deferred and row.status == "failed" and row.attempts:
                self.world.violation(f"task {id_[-2]} is shown as failed and waits for its next attempt")

    # --- taskstore ---

    def upsert(self, rows: Iterable[TaskRow]) -> None:
        """Merge rows as taskstore.upsert does."""
        for row in rows:
            known = self.tasks.get(row.id)
            key = (row.tenant or "", row.idempotency_key) if row.idempotency_key else None
            if key is not None and self.keys.setdefault(key, row.id) != row.id:
                continue
            self.tasks[row.id] = row if known is None else merge(known, row)

    def insert_events(self, entries: Iterable[TimelineRow]) -> None:
        """Insert timeline entries that do not exist yet."""
        for entry in entries:
            self.entries.setdefault((entry.task_id, entry.event_id), entry)

    def store_failures(self, events: Iterable[pb.MxFailed]) -> None:
        """Mark the deliveries of these tasks as failed, as mx_failures.store_failures does."""
        for row in map(failed_row, events):
            self.deliveries[row.task_id] = merge_failure(self.deliveries.get(row.task_id), row)

    def insert_bodies(self, bodies: Iterable[Body]) -> None:
        """Insert bodies that do not exist yet."""
        for body in bodies:
            self.bodies.setdefault(body.task_id, body)

    def owners_of_keys(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[bytes, bytes]]:
        """Return the task id and the request hash of each key."""
        found = {}
        for tenant, key in keys:
            id_ = self.keys.get((tenant, key.encode()))
            if id_ is not None:
                found[tenant, key] = (id_, self.tasks[id_].request_hash or b"")
        return found

    def load_tasks(self, ids: Sequence[bytes]) -> dict[bytes, pb.MailTask]:
        """Return the whole tasks, rebuilt from their rows."""
        tasks = {}
        for id_ in ids:
            row, body = self.tasks.get(id_), self.bodies.get(id_)
            if row is None or row.created_at is None:
                continue
            tasks[id_] = pb.MailTask(
                id=id_,
                tenant=row.tenant or "",
                idempotency_key=(row.idempotency_key or b"").decode(),
                request_hash=row.request_hash or b"",
                email=row.recipient or "",
                domain=row.domain or "",
                subject=row.subject or "",
                body=body.body if body else None,
                html=body.html if body else None,
                headers=json.loads(body.headers) if body and body.headers else {},
                labels=json.loads(row.labels) if row.labels else {},
                created_at_us=to_micros(row.created_at),
            )
        return tasks

    def send_times(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Return the send time of each scheduled task in microseconds."""
        lines = [self.entries[id_, CREATED_KEY] for id_ in ids if (id_, CREATED_KEY) in self.entries]
        return {line.task_id: to_micros(line.next_attempt_at) for line in lines if line.next_attempt_at}

    def sizes_of_bodies(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Return the size of each task's body in bytes."""
        return {id_: len((self.bodies[id_].body or "").encode()) for id_ in ids if id_ in self.bodies}

    def load_events(self, keys: Sequence[tuple[bytes, str]]) -> dict[tuple[bytes, str], TimelineRow]:
        """Return the timeline entries with these keys."""
        return {key: self.entries[key] for key in keys if key in self.entries}

    def load_epoch(self, task_id: bytes, topics: Sequence[str], epoch: int) -> list[TimelineRow]:
        """Return the timeline entries of a task for these topics and this epoch."""
        begin = tuple(f"{topic}:{epoch}:" for topic in topics)
        return [
            line
            for (id_, key), line in sorted(self.entries.items())
            if id_ == task_id and key.startswith(begin)
        ]

    # --- deciding ---

    def lock_row(self, tenant: str, id_: bytes) -> tuple[str, int, int] | None:
        """Return the status, epoch and attempts of a tenant's task."""
        row = self.tasks.get(id_)
        return None if row is None or row.tenant != tenant else (row.status, row.epoch, row.attempts)

    def lock_rows(self, ids: Iterable[bytes]) -> tuple[dict[bytes, Delivery], datetime]:
        """Return the deliveries of these tasks and the time."""
        return {id_: self.deliveries[id_] for id_ in ids if id_ in self.deliveries}, self.now()

    def store_rows(self, rows: Iterable[Delivery]) -> None:
        """Write deliveries, and replace those that exist."""
        for row in rows:
            self.deliveries[row.task_id] = row

    def insert_row(self, row: Delivery) -> bool:
        """Insert a delivery unless its task has one. Return whether it did."""
        return self.deliveries.setdefault(row.task_id, row) is row

    # --- outbox ---

    def put(self, items: Sequence[OutboxRow], seconds: int = GRACE) -> None:
        """Add items, due in `seconds`."""
        for item in items:
            self.outbox.setdefault(item, self.world.now + seconds)
        self._notify()

    def insert_scheduled(self, items: Sequence[tuple[OutboxRow, datetime]]) -> None:
        """Add items, each due at its time."""
        for item, due in items:
            self.outbox.setdefault(item, self.at(due))
        self._notify()

    def delete(self, rows: Sequence[OutboxRow]) -> None:
        """Delete rows."""
        for row in rows:
            self.outbox.pop(row, None)

    def take(self, limit: int) -> list[OutboxRow]:
        """Return due items, which are due again after SWEEP_SECONDS."""
        due = [item for item, at in self.outbox.items() if at <= self.world.now][:limit]
        self.defer(due, SWEEP_SECONDS)
        return due

    def next_due(self, within: float) -> float:
        """Return the seconds until an item is due."""
        return min(within, *(at - self.world.now for at in self.outbox.values()), within)

    def make_due(self, task_id: bytes) -> None:
        """Make the scheduled items of a task due."""
        for item, at in self.outbox.items():
            if item.task_id == task_id and at > self.world.now + SWEEP_SECONDS:
                self.outbox[item] = self.world.now
        self._notify()

    def defer(self, items: Sequence[OutboxRow], seconds: int) -> None:
        """Make items due in `seconds`."""
        for item in items:
            if item in self.outbox:
                self.outbox[item] = self.world.now + seconds
        self._notify()

    def _notify(self) -> None:
        for call in self.outbox_changed:
            call()


class MemoryClaims:
    """Answers like `services.sender.claims.Claims`, from a Database."""

    def __init__(self, database: Database, lease_seconds: float, hold: bool, max_resends: int = 1) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_seconds)
        self._hold, self._max_resends = hold, max_resends

    def claim(self, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]:
        """Answer each request, in order."""
        since = self._database.world.scheduler.asked + VirtualTime.monotonic() - self._database.world.now
        return self._database.transact(
            lambda db: [self._claim(db, r, since, take_over) for r in requests], "claim"
        )

    def store(self, new_rows: Sequence[Delivery]) -> list[Settlement]:
        """Store each outcome unless its claim was lost."""
        return self._database.transact(lambda db: [self._store(db, row) for row in new_rows], "settle")

    def renew(self, rows: Sequence[Delivery]) -> list[bool]:
        """Renew each lease. Return which claims are still held."""
        return self._database.transact(lambda db: [self._renew(db, row) for row in rows], "renew")

    def _claim(
        self, database: Database, request: Claim | Cancel, since: float, take_over: bool
    ) -> ClaimAnswer:
        found = database.deliveries.get(request.task_id)
        answer, row = rules.decide(
            found, request, database.now(), self._lease, self._hold, self._max_resends, take_over
        )
        if row is not None:
            self._write(database, found, row)
        _trace(database, request.task_id, f"{type(request).__name__} -> {_summary(answer)}")
        return answer._replace(since=since) if isinstance(answer, Taken) else answer

    def _store(self, database: Database, wish: Delivery) -> Settlement:
        found = database.deliveries.get(wish.task_id)
        became, row = fence.settlement(found, wish)
        if row is not None:
            self._write(database, found, row)
        if wish.state == "sent" and database.sent_by.get(wish.owner) is not Settlement.STORED:
            database.sent_by[wish.owner] = became
        _trace(database, wish.task_id, f"settle {wish.state} {wish.reason} -> {became.value}")
        return became

    def _renew(self, database: Database, row: Delivery) -> bool:
        found = database.deliveries.get(row.task_id)
        if found is None or found.owner != row.owner or found.state != "sending":
            return False
        database.deliveries[row.task_id] = found._replace(lease_until=database.now() + self._lease)
        return True

    def _write(self, database: Database, found: Delivery | None, row: Delivery) -> None:
        database.deliveries[row.task_id] = row


def _summary(answer: ClaimAnswer) -> str:
    match answer:
        case Taken(row=row, doubtful=doubtful):
            return f"taken for attempt {row.attempt}{', in doubt' if doubtful else ''}"
        case rules.Settled(row=row):
            return f"stored as {row.state} {row.reason}"
        case rules.Wait(seconds=seconds):
            return f"wait {seconds:.1f} s"
    return "stale"


def _trace(database: Database, task_id: bytes, text: str) -> None:
    world = database.world
    if world.lines is not None:
        actor: Any = world.scheduler.actor
        world.trace(actor.name if actor else "-", f"task {task_id[-2]}: {text}")
