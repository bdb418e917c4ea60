"""The plan of a schedule: its tasks, replicas and faults, as plain data that a seed makes.

A run depends on its plan only. So a failing plan can be printed, shrunk and run again.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Act", "Fault", "Plan", "TaskPlan", "dump", "load", "make"]


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One Create, and the answers of DNS and the mail server.

    `dns` is what each lookup of its domain finds: `ok`, `soft` (SERVFAIL) or `none` (no such domain). `smtp`
    is how each delivery ends (mail.py). The last value of either repeats. With `key` the client has an
    idempotency key, and repeats the Create until it has an answer. With `twice` it calls on two connections
    at once. The task is scheduled `send_in` seconds ahead.
    """

    at: float
    dns: tuple[str, ...] = ("ok",)
    smtp: tuple[str, ...] = ("ok",)
    key: bool = True
    twice: bool = False
    send_in: float = 0.0


@dataclass(frozen=True, slots=True)
class Act:
    """An act of a client or an operator.

    `cancel` and `retry` a task, by its number. `replay` a topic with a new epoch. `poison` a topic with a
    record that no stage can decode.
    """

    at: float
    what: str
    task: int = 0
    topic: str = "task.created"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, at a time or with the nth operation of a kind (`on`, `nth`).

    - `kill`, `stop` (SIGTERM), `freeze`, `evict` and `redeliver` strike one replica of `service`, or the one
      whose operation it is. It restarts or goes on after `seconds`.
    - `join` adds a replica for `seconds`.
    - `database`, `kafka` and `relay` are away for `seconds`.
    - `unheard`: the operation takes effect, but its answer is an error.
    - `refused`: the operation has no effect, and its answer is an error.
    - `again`: the operation is done twice.
    """

    what: str
    at: float = 0.0
    on: str = ""
    nth: int = 0
    service: str = ""
    replica: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole schedule."""

    seed: int
    tasks: tuple[TaskPlan, ...]
    acts: tuple[Act, ...] = ()
    faults: tuple[Fault, ...] = ()
    replicas: tuple[int, ...] = (1, 1, 2, 1)
    """The number of replicas of each service, in the order of `processes.SERVICES`."""
    hold: bool = False
    in_flight: int = 50
    replay_all: bool = False


_SMTP_ENDS = ("ok", "ok", "ok", "ok", "ok", "ok", "reject", "reject_after_dot")
_SMTP_TROUBLE = (
    "defer",
    "drop_before",
    "kept_unheard",
    "lost_unheard",
    "slow",
    "slow",
    "hang",
    "defer_slow",
    "torn",
)
_OPS = ("claim", "settle", "renew", "api.db", "status.db", "produce", "commit", "mail", "fetch")


def make(seed: int) -> Plan:
    """Return the plan of a seed."""
    rng = random.Random(seed)
    tasks = tuple(_task(rng) for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 2, 2, 3, 4))))
    last = max(task.at for task in tasks)
    acts = tuple(_act(rng, len(tasks), last) for _ in range(rng.choice((0, 0, 0, 1, 1, 2))))
    faults = tuple(_fault(rng, last) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))))
    if any(act.what == "poison" for act in acts) and rng.random() < 0.4:
        faults += (Fault("refused", on="dead", nth=rng.randrange(1, 3)),)
    if rng.random() < 0.2:
        tasks, fault = _amid_a_mail(rng, tasks)
        faults += (fault,)
    if rng.random() < 0.1:
        tasks, faults = _slow_replies(rng, tasks)
    replicas = (1, rng.choice((1, 1, 1, 1, 2)), rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 1, 1, 2)))
    return Plan(
        seed,
        tasks,
        acts,
        faults,
        replicas,
        hold=rng.random() < 0.35,
        in_flight=rng.choice((1, 2, 50, 50)),
        replay_all=rng.random() < 0.15,
    )


def _amid_a_mail(rng: random.Random, tasks: tuple[TaskPlan, ...]) -> tuple[tuple[TaskPlan, ...], Fault]:
    """Slow the first mail down, and add a fault of its sender meanwhile."""
    first = replace(
        tasks[0], smtp=(rng.choice(("slow", "slow", "hang", "defer_slow", "defer")), *tasks[0].smtp)
    )
    fault = Fault(
        rng.choice(("evict", "evict", "freeze", "freeze", "kill", "redeliver", "stop")),
        on=rng.choice(("claim", "mail", "settle")),
        nth=rng.choice((1, 1, 2)),
        seconds=float(rng.choice((1, 12, 25, 35))),
    )
    return (first, *tasks[1:]), fault


def _slow_replies(
    rng: random.Random, tasks: tuple[TaskPlan, ...]
) -> tuple[tuple[TaskPlan, ...], tuple[Fault, ...]]:
    """Make replies slower than a revocation or a drain waits, and let senders come and go meanwhile."""
    slow = tuple(replace(task, smtp=(rng.choice(("hang", "hang", "torn", "slow")), "ok")) for task in tasks)
    faults = tuple(
        Fault(
            rng.choice(("join", "join", "stop", "stop", "evict", "redeliver")),
            at=round(0.1 + 50 * rng.random(), 3),
            service="sender",
            replica=rng.randrange(3),
            seconds=round(0.1 + 40 * rng.random(), 3),
        )
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    if rng.random() < 0.3:
        away = Fault("database", at=round(2 + 20 * rng.random(), 3), seconds=round(20 + 30 * rng.random(), 3))
        faults += (away,)
    return slow, faults


def _task(rng: random.Random) -> TaskPlan:
    dns = tuple(["soft"] * rng.choice((0, 0, 0, 0, 0, 1, 3)) + [rng.choice(("ok",) * 9 + ("none",))])
    trouble = [rng.choice(_SMTP_TROUBLE) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    return TaskPlan(
        at=round(rng.choice((0.0, 3.0 * rng.random())), 3),
        dns=dns,
        smtp=(*trouble, rng.choice(_SMTP_ENDS)),
        key=rng.random() < 0.8,
        twice=rng.random() < 0.1,
        send_in=round(rng.choice((0, 0, 0, 0, 0, 0, 0, rng.random(), 30 * rng.random())), 3),
    )


def _act(rng: random.Random, tasks: int, last: float) -> Act:
    what = rng.choice(("cancel", "cancel", "cancel", "retry", "replay", "replay", "poison"))
    return Act(
        at=round(last + rng.choice((rng.random() * 0.2, rng.random() * 5, rng.random() * 100)), 4),
        what=what,
        task=rng.randrange(tasks),
        topic=rng.choice(("task.created", "mx.ok"))
        if what == "replay"
        else rng.choice(("task.created", "mx.ok", "mail.sent")),
    )


def _fault(rng: random.Random, last: float) -> Fault:
    what = rng.choice(
        ("kill",) * 5
        + ("freeze",) * 4
        + ("stop", "evict", "evict", "evict", "redeliver", "join", "database", "kafka", "relay")
        + ("unheard",) * 2
        + ("refused", "again")
    )
    seconds = round(
        rng.choice((rng.random(), 5 * rng.random(), 5 + 20 * rng.random(), 20 + 15 * rng.random())), 3
    )
    if what == "unheard":
        return Fault(
            what,
            on=rng.choice(
                ("claim", "settle", "renew", "api.db", "status.db", "produce", "produce", "commit")
            ),
            nth=_nth(rng),
        )
    if what == "refused":
        return Fault(
            what,
            on=rng.choice(("claim", "settle", "api.db", "status.db", "produce", "produce", "commit")),
            nth=_nth(rng),
        )
    if what == "again":
        return Fault(what, on=rng.choice(("claim", "settle", "api.db", "status.db")), nth=_nth(rng))
    if what in ("kill", "freeze", "stop", "evict", "redeliver") and rng.random() < 0.6:
        on = rng.choice(_OPS)
        return Fault(what, on=on, nth=_nth(rng), seconds=seconds)
    at = round(
        rng.choice(
            (rng.random() * 0.1, 2 * rng.random(), last + rng.random() * 0.2, last + 40 * rng.random())
        ),
        4,
    )
    service = rng.choice(("api", "validator", "sender", "sender", "sender", "sender", "status"))
    if what == "join" and service == "api":
        service = "sender"
    return Fault(what, at=at, service=service, replica=rng.randrange(3), seconds=seconds)


def _nth(rng: random.Random) -> int:
    return 1 + min(rng.randrange(12), rng.randrange(12))


def dump(plan: Plan) -> str:
    """Return the plan as JSON, without the default values."""
    made = asdict(plan)
    made["tasks"] = [_slim(asdict(task), TaskPlan(0.0)) for task in plan.tasks]
    made["acts"] = [_slim(asdict(act), Act(0.0, "")) for act in plan.acts]
    made["faults"] = [_slim(asdict(fault), Fault("")) for fault in plan.faults]
    plain = asdict(replace(Plan(0, ()), seed=-1))
    return json.dumps({k: v for k, v in made.items() if v != plain[k]}, separators=(",", ":"))


def _slim(values: dict[str, object], plain: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value != getattr(plain, name)}


def load(text: str) -> Plan:
    """Return the plan that `dump` wrote."""
    read = json.loads(text)
    tasks = tuple(_task_of(values) for values in read.pop("tasks"))
    acts = tuple(Act(**{"at": 0.0, "what": ""} | act) for act in read.pop("acts", ()))
    faults = tuple(Fault(**fault) for fault in read.pop("faults", ()))
    if "replicas" in read:
        read["replicas"] = tuple(read["replicas"])
    return Plan(tasks=tasks, acts=acts, faults=faults, **read)


def _task_of(values: dict[str, Any]) -> TaskPlan:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return TaskPlan(**{"at": 0.0} | values | lists)
