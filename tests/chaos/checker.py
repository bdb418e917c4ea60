"""Checks the rules that hold for every run, by what the run recorded. Pure: values in, a verdict out.

The mail server's journal is the truth. The clients' history says which Creates were acknowledged. A Create
without an answer may be missing; but if the system recorded its task, that task must end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Create", "Evidence", "Mail", "Recovery", "Row", "Verdict", "check", "load_evidence", "task_of"]

TERMINAL = frozenset({"completed", "failed", "uncertain", "cancelled"})
# A task whose next attempt is in the future, or was due at most this many seconds ago, is deferred.
_DUE = 2.0


@dataclass(frozen=True, slots=True)
class Create:
    """A client's Create and its `outcome`: acked (then with `id`), refused, unknown or error.

    `expected` is the status in which the task must end. `details` is the text of an error.
    """

    number: int
    email: str
    outcome: str
    expected: str
    id: str = ""
    details: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A task as the API shows it. `number` is the client's, from the subject. `next_at` is 0 when unset."""

    id: str
    number: int
    email: str
    status: str
    reason: str = ""
    next_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Mail:
    """A line of the mail server's journal."""

    message_id: str
    rcpt: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """How many seconds the system took to serve again after a fault; `limit` is None without a promise.

    `seconds` is None when the next fault came first. `gave_up` then says that the recovery was late by that
    time, or never came.
    """

    fault: str
    what: str
    seconds: float | None
    limit: float | None = None
    gave_up: bool = False


@dataclass(slots=True)
class Evidence:
    """Everything that a run recorded.

    `doubts` has the Message-IDs of the attempts in doubt for each task that was sent more than once.
    `published` counts the records of each task by topic. `collected` is the time in Unix seconds when the
    rows were read.
    """

    creates: Sequence[Create]
    rows: Sequence[Row]
    journal: Sequence[Mail]
    doubts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, int]] | None = None
    lag: Mapping[str, int] = field(default_factory=dict)
    dead: Sequence[str] = ()
    recoveries: Sequence[Recovery] = ()
    exits: Sequence[str] = ()
    crashes: Sequence[str] = ()
    collected: float = 0.0


@dataclass(slots=True)
class Verdict:
    """The figures of a run, and every breach of a rule as (rule, what)."""

    tasks: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    settled: int = 0
    deferred: int = 0
    lost: int = 0
    copies: int = 0
    explained: int = 0
    unexplained: int = 0
    breaches: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when every rule held."""
        return not self.breaches


def task_of(message_id: str) -> str:
    """Return the task id in a Message-ID of this system."""
    return message_id.strip("<>").partition("@")[0]


def check(evidence: Evidence, slack: float = 0.0) -> Verdict:
    """Return the verdict. `slack`: seconds that a recovery may take beyond its limit."""
    verdict = Verdict(tasks=len(evidence.creates))
    rows = {row.id: row for row in evidence.rows}
    mails: dict[str, list[Mail]] = defaultdict(list)
    for mail in evidence.journal:
        mails[task_of(mail.message_id)].append(mail)
    _clients(evidence, rows, mails, verdict)
    _tasks(evidence, rows, mails, verdict)
    _journal(evidence, rows, mails, verdict)
    _rest(evidence, slack, verdict)
    return verdict


def _settled(row: Row) -> bool:
    return row.status in TERMINAL


def _deferred(row: Row, evidence: Evidence) -> bool:
    return not _settled(row) and row.next_at > evidence.collected - _DUE


def _clients(
    evidence: Evidence, rows: Mapping[str, Row], mails: Mapping[str, Sequence[Mail]], verdict: Verdict
) -> None:
    """Check that each acknowledged task exists, has ended as expected, and has a mail if completed."""
    for create in evidence.creates:
        if create.outcome != "acked":
            if create.outcome == "error":
                verdict.breaches.append(("answer", f"{create.number} {create.email}: {create.details}"))
            verdict.refused += create.outcome == "refused"
            verdict.unknown += create.outcome == "unknown"
            continue
        verdict.acknowledged += 1
        row = rows.get(create.id)
        if row is None:
            verdict.lost += 1
            verdict.breaches.append(("lost", f"{create.id} {create.email}: acknowledged, not in the table"))
            continue
        if row.number != create.number:
            verdict.breaches.append(("answer", f"{create.id}: answered to {create.number}, is {row.number}"))
        if not _settled(row):
            if _deferred(row, evidence):
                verdict.deferred += 1
            else:
                verdict.lost += 1
                verdict.breaches.append(("lost", f"{row.id} {row.email}: still {row.status} {row.reason}"))
            continue
        verdict.settled += 1
        if row.status == "completed" and not mails.get(row.id):
            verdict.lost += 1
            verdict.breaches.append(("lost", f"{row.id} {row.email}: completed, but no mail was taken"))
        if row.status != create.expected:
            verdict.breaches.append(
                ("end", f"{row.id} {row.email}: {row.status} {row.reason}, not {create.expected}")
            )


def _tasks(
    evidence: Evidence, rows: Mapping[str, Row], mails: Mapping[str, Sequence[Mail]], verdict: Verdict
) -> None:
    """Check that unacknowledged tasks end too, and that no client's task was recorded twice."""
    acked = {create.id for create in evidence.creates if create.outcome == "acked"}
    for row in rows.values():
        if row.id in acked:
            continue
        if not _settled(row) and not _deferred(row, evidence):
            verdict.breaches.append(("stuck", f"{row.id} {row.email}: still {row.status}, unacknowledged"))
        if row.status == "completed" and not mails.get(row.id):
            verdict.breaches.append(("lost", f"{row.id}: completed, unacknowledged, but no mail was taken"))
    for number, count in Counter(row.number for row in rows.values()).items():
        if count > 1:
            verdict.breaches.append(("double", f"the client's task {number} was recorded {count} times"))
    refused = {create.number for create in evidence.creates if create.outcome == "refused"}
    for row in rows.values():
        if row.number in refused:
            verdict.breaches.append(("refused", f"{row.id} was recorded though its client was refused"))


def _journal(
    evidence: Evidence, rows: Mapping[str, Row], mails: Mapping[str, Sequence[Mail]], verdict: Verdict
) -> None:
    """Check that each task has one mail or none, as its status says. A copy needs a recorded doubt."""
    for id_, taken in mails.items():
        row = rows.get(id_)
        if row is None:
            verdict.breaches.append(("stray", f"a mail of {id_}, which is no task"))
            continue
        if wrong := {mail.rcpt for mail in taken} - {row.email}:
            verdict.breaches.append(("stray", f"{id_}: mail to {', '.join(sorted(wrong))}, not {row.email}"))
        if row.status in ("failed", "cancelled"):
            verdict.breaches.append(("unwanted", f"{id_} {row.email}: {row.status}, but its mail was taken"))
        extra = len(taken) - 1
        if not extra:
            continue
        verdict.copies += extra
        if len({mail.message_id for mail in taken}) > 1:
            verdict.breaches.append(("copies", f"{id_}: copies under several Message-IDs"))
        doubts = list(evidence.doubts.get(id_, ())).count(taken[0].message_id)
        explained = min(extra, doubts)
        verdict.explained += explained
        verdict.unexplained += extra - explained
        if extra > explained:
            verdict.breaches.append(
                ("copies", f"{id_} {row.email}: {extra} copies, {doubts} attempts in doubt on record")
            )


def _rest(evidence: Evidence, slack: float, verdict: Verdict) -> None:
    """Check the topics, the lag, the dead letters, the crashes and the recoveries."""
    if evidence.published is not None:
        _topics(evidence, evidence.published, verdict)
    for stage, records in evidence.lag.items():
        if records:
            verdict.breaches.append(("lag", f"{stage}: {records} records not committed"))
    verdict.breaches += [("dead", dead_letter) for dead_letter in evidence.dead]
    verdict.breaches += [("crash", crash) for crash in evidence.crashes]
    for recovery in evidence.recoveries:
        if recovery.limit is None or (recovery.seconds is None and not recovery.gave_up):
            continue
        if recovery.seconds is None or recovery.seconds > recovery.limit + slack:
            took = "not in time" if recovery.seconds is None else f"{recovery.seconds:.1f} s"
            verdict.breaches.append(
                ("late", f"{recovery.fault}: {recovery.what} {took}, promised within {recovery.limit:g} s")
            )


def _topics(evidence: Evidence, published: Mapping[str, Mapping[str, int]], verdict: Verdict) -> None:
    """Check that the topics hold what the table says, since a rebuild reads the topics only."""
    created, sent = published.get("task.created", {}), published.get("mail.sent", {})
    ends: set[str] = set()
    for topic in ("mail.sent", "mail.failed", "mx.failed", "task.cancelled"):
        ends |= set(published.get(topic, {}))
    for row in evidence.rows:
        if row.id not in created:
            verdict.breaches.append(("topics", f"{row.id}: in the table, not on task.created"))
        if row.status == "completed" and row.id not in sent:
            verdict.breaches.append(("topics", f"{row.id}: completed, not on mail.sent"))
        elif _settled(row) and row.id not in ends:
            verdict.breaches.append(("topics", f"{row.id}: {row.status}, and no event says so"))


def load_evidence(folder: Mapping[str, Sequence[Any]], expected: Mapping[str, str]) -> Evidence:
    """Return the evidence of a run. `folder` has the lines of its files by name (runner.FILES)."""
    history = folder["history"]
    summary = folder["summary"][0]
    return Evidence(
        creates=[
            Create(
                entry["number"], entry["email"], entry["outcome"], expected[entry["email"]],
                entry.get("id", ""), f"{entry.get('code', '')} {entry.get('details', '')}",
            )
            for entry in history
            if entry["what"] == "create"
        ],
        rows=[Row(**row) for row in folder["tasks"]],
        journal=[Mail(line["message_id"], line["rcpt"], line["at"]) for line in folder["journal"]],
        doubts={entry["id"]: entry["doubts"] for entry in folder["timelines"]},
        published={entry["topic"]: entry["tasks"] for entry in folder["topics"]},
        lag=summary["lag"],
        dead=summary["dead"],
        recoveries=[
            Recovery(e["fault"], e["served"], e["seconds"], e["limit"], e["gave_up"])
            for e in history
            if e["what"] == "recovered"
        ],
        exits=[f"{e['name']} ({e['code']})" for e in history if e["what"] == "exit"],
        crashes=[f"{e['name']} ended by signal {-e['code']}" for e in history
                 if e["what"] == "exit" and e["crash"]],
        collected=summary["collected"],
    )  # fmt: skip
