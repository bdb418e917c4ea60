"""Checks a schedule once it is quiet. The mail server's journal and the topics are the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.settlement import Settlement
from services.common.events import DECODERS, task_id
from services.common.fold import fold
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.stages import STAGES
from tests.simulation.processes import SIMULATED

if TYPE_CHECKING:
    from tests.simulation.mail import Copy
    from tests.simulation.run import Schedule

__all__ = ["TERMINAL", "check", "check_replay", "copies_of_settled"]

TERMINAL = frozenset({"completed", "failed", "uncertain", "cancelled"})
"""The statuses in which a task may end."""


def check(schedule: Schedule, settled: bool) -> None:
    """Record every violation in the schedule's world."""
    violation = schedule.world.violation
    if not settled:
        lag = {name: group.lag() for name, group in schedule.broker.groups.items() if group.lag()}
        outbox = len(schedule.database.outbox)
        violation(f"not quiet in time: lag {lag}, outbox {outbox}, clients {schedule.clients.waiting}")
    events = _events(schedule)
    rows = schedule.database.tasks
    for id_ in sorted(schedule.clients.accepted - rows.keys()):
        violation(f"task {id_[-2]} was accepted and is not there")
    keys = [row.idempotency_key for row in rows.values() if row.idempotency_key]
    if len(keys) != len(set(keys)):
        violation("two tasks under one idempotency key")
    for id_ in sorted(rows):
        _check_task(schedule, id_, events.get(id_, []))
    for id_, asked, status in schedule.clients.answers:
        _check_answer(schedule, id_, asked, status, events.get(id_, []))
    _check_dead(schedule)


def _check_answer(schedule: Schedule, id_: bytes, asked: float, status: str, events: list[Any]) -> None:
    """Check that the answer to a Cancel is true, and stays true unless the task is reopened.

    A Cancel that closed an uncertain task says nothing about its mail: a frozen sender may still get the
    relay's reply.
    """
    now = schedule.database.tasks[id_].status
    copies = [copy for copy in schedule.mail.journal if copy.task == id_]
    name = f"task {id_[-2]}"
    if status == "completed" and (now != "completed" or not copies):
        schedule.world.violation(f"{name} was said to be completed and is {now}, sent {len(copies)} times")
    holds = now == "cancelled" and not copies
    if any(map(_doubtful, events)):
        holds = now == "cancelled" or (now == "completed" and bool(copies))
    if status == "cancelled" and schedule.clients.reopened.get(id_, -1.0) < asked and not holds:
        schedule.world.violation(f"{name} was said to be cancelled and is {now}, sent {len(copies)} times")
    if status not in TERMINAL:
        schedule.world.violation(f"a cancel of {name} was answered that it is {status}")


def _check_task(schedule: Schedule, id_: bytes, events: list[Any]) -> None:
    violation, name = schedule.world.violation, f"task {id_[-2]}"
    row = schedule.database.tasks[id_]
    if row.status not in TERMINAL:
        violation(f"{name} is {row.status} in the end")
    expected, epoch = _expected_end(events)
    if row.status != expected:
        violation(f"{name} is {row.status}, and its events say {expected}")
    if expected != "completed" and row.epoch != epoch:
        violation(f"{name} stands at epoch {row.epoch}, and its events at {epoch}")
    rebuilt = None
    for event in events:
        rebuilt = fold(rebuilt, event)
    if rebuilt is not None and rebuilt != row:
        columns = {n: (a, b) for n, a, b in zip(row._fields, row, rebuilt, strict=True) if a != b}
        violation(f"{name} rebuilt from the topics is another than in the table: {columns}")

    copies = [copy for copy in schedule.mail.journal if copy.task == id_]
    wanted = schedule.plan.tasks[id_[-2]].send_in
    # A reopened task is sent at once.
    due = 0.0 if row.created_at is None else schedule.database.at(row.created_at) + wanted
    if id_ not in schedule.clients.reopened and any(copy.at < due for copy in copies):
        violation(f"{name} was sent before its time")
    sent_by = schedule.database.sent_by
    # One copy per task needs no doubt: the sender got the reply and stored it.
    plain = [copy for copy in copies if sent_by.get(copy.owner) is Settlement.STORED]
    doubts = [event for event in events if _doubtful(event)]
    if len(plain) > 1:
        violation(f"{name} was sent {len(plain)} times, each time without a doubt")
    if len(copies) - max(1, len(plain)) > len(doubts):
        violation(f"{name} was sent {len(copies)} times with {len(doubts)} doubts on record")
    limit = 1 + schedule.servers.settings.max_resends
    if id_ not in schedule.clients.reopened and len(copies) > limit:
        violation(f"{name} was sent {len(copies)} times, {limit} are allowed")
    _check_copies(schedule, name, copies)
    if len({copy.message_id for copy in copies} | {doubt.message_id for doubt in doubts}) > 1:
        violation(f"{name} has several Message-IDs")
    if row.status == "completed" and not copies:
        violation(f"{name} is completed and was never sent")
    if row.status == "cancelled" and copies and not doubts:
        violation(f"{name} is cancelled and was sent")
    if plain and row.status != "completed":
        violation(f"{name} was sent and is {row.status}")
    if row.status == "failed" and copies and not doubts:
        violation(f"{name} is failed and was sent")
    stored = {
        (entry.kind, entry.detail) for entry in schedule.database.entries.values() if entry.task_id == id_
    }
    recorded = sum(1 for kind, _ in stored if kind == "in_doubt")
    if doubts and not recorded:
        violation(f"{name} has doubts that its timeline does not show")


def _check_copies(schedule: Schedule, name: str, copies: list[Copy]) -> None:
    """Check that a mail was sent again only after its sender died or froze, or its reply was lost."""
    for copy in copies[:-1]:
        if copy.process not in schedule.struck and copy.owner not in schedule.mail.unheard:
            schedule.world.violation(f"{name} was sent again, though nothing had died and no reply was lost")


def _check_dead(schedule: Schedule) -> None:
    violation, bare = schedule.world.violation, Names()
    for stage in SIMULATED:
        dead_letters = schedule.broker.records(bare.dead(stage))
        for record in dead_letters:
            if record.value() != b"\xff\xff":
                cause = dict(record.headers()).get("cause", b"").decode()
                violation(f"{stage} has an unexpected dead letter: {cause[:200]}")
        poisons = {
            b"%16d" % (n + 1)
            for n, topic in enumerate(schedule.clients.poison)
            if topic in STAGES[stage].reads
        }
        if missing := poisons - {record.key() for record in dead_letters}:
            violation(f"{stage} dropped {len(missing)} records that it could not decode")


def copies_of_settled(schedule: Schedule) -> dict[bytes, int]:
    """Return how often the mail of each completed task was sent so far."""
    rows = schedule.database.tasks
    return {
        id_: sum(1 for copy in schedule.mail.journal if copy.task == id_)
        for id_, row in rows.items()
        if row.status == "completed"
    }


def check_replay(schedule: Schedule, before: dict[bytes, int]) -> None:
    """Record a violation for each mail that a replay sent again."""
    for id_, count in before.items():
        now = sum(1 for copy in schedule.mail.journal if copy.task == id_)
        if now != count:
            schedule.world.violation(f"task {id_[-2]} was sent again by a replay")


def _events(schedule: Schedule) -> dict[bytes, list[Any]]:
    found: dict[bytes, list[Any]] = {}
    for topic in EVENT_TOPICS:
        for message in schedule.broker.records(topic):
            if message.value() != b"\xff\xff":
                event = DECODERS[topic](message.value())
                found.setdefault(task_id(event), []).append(event)
    return found


def _doubtful(event: Any) -> bool:
    return (isinstance(event, pb.MailDeferred) and event.in_doubt) or (
        isinstance(event, pb.MailFailed) and event.uncertain
    )


def _expected_end(events: list[Any]) -> tuple[str, int]:
    """Return the status and the epoch that the events of a task lead to, without the help of fold.py."""
    if any(isinstance(event, pb.MailSent) for event in events):
        return "completed", 0
    epoch = max((event.epoch for event in events), default=0)
    last = [event for event in events if event.epoch == epoch]
    if any(isinstance(event, pb.MailFailed) and event.uncertain for event in last):
        return "uncertain", epoch
    if any(isinstance(event, pb.MailFailed) for event in last):
        return "failed", epoch
    # An event of the sender in this epoch overrules a late verdict.
    had = any(isinstance(event, pb.MailDeferred) and event.stage == "sender" for event in last)
    if not had and any(isinstance(event, pb.MxFailed) for event in last):
        return "failed", epoch
    if any(isinstance(event, pb.TaskCancelled) for event in last):
        return "cancelled", epoch
    return "unsettled", epoch
