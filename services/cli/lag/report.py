"""What a sample means: rows for people and programs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from services.cli.lag.sample import Place, Sample
from services.common.kafka.topics import delay_of

__all__ = ["remarks", "report"]

# A stage's first record waits longer only where it does not keep up (seconds).
_BEHIND = 5.0
_LAST_SECOND = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()


def report(
    reads: Mapping[str, Sequence[str]], now: Sample, before: Sample | None, *, partitions: bool
) -> dict[str, Any]:
    """Return `{at, stages, delays}`, and `partitions` where asked for.

    `reads` names the topics of each stage. A delay topic that no replica reads is left out, unless something
    waits there or the stage has no replica: it is of earlier settings. A rate needs a sample from `before`,
    and is None without one. What waits on a delay topic is not lag, unless it is overdue.
    """
    reads = {stage: [t for t in topics if _counts(stage, t, now)] for stage, topics in reads.items()}
    found: dict[str, Any] = {
        "at": _iso(now.at),
        "stages": [_stage(stage, topics, now, before) for stage, topics in reads.items()],
        "delays": [row for stage, topics in reads.items() for row in _delays(stage, topics, now)],
    }
    if partitions:
        found["partitions"] = [
            row for stage, topics in reads.items() for row in _partitions(stage, topics, now)
        ]
    return found


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return what a report means that its figures alone do not tell."""
    said = []
    for row in found["stages"]:
        if row["stage"] == "status" and (row["oldest_waiting_seconds"] or 0) > _BEHIND:
            said.append(
                "status is behind: until it has caught up, tasks show an older state than they have;"
                " a mail may be out though its task is pending or processing."
            )
        still = row["members"] and row["lag"] and row["read_per_second"] == 0
        if row["stage"] == "sender" and still and "domains" not in found:
            said.append(
                "The sender commits nothing: postroad lag --stage sender --domains shows whose mails it has"
                " in hand."
            )
    return said


def _counts(stage: str, topic: str, now: Sample) -> bool:
    if delay_of(topic) is None or not (members := now.groups[stage].members):
        return True
    places = _places([topic], now, delayed=True)
    return any(member.owns & {*places} for member in members) or any(now.waiting(stage, p) for p in places)


def _stage(stage: str, topics: Sequence[str], now: Sample, before: Sample | None) -> dict[str, Any]:
    group, places = now.groups[stage], _places(topics, now, delayed=False)
    every = {*places, *_places(topics, now, delayed=True)}
    owned = frozenset[Place]().union(*(member.owns for member in group.members))
    members = [
        {
            "client": member.client,
            "host": member.host,
            "member": member.id,
            "partitions": len(member.owns & every),
            "lag": sum(now.waiting(stage, place) for place in places if place in member.owns),
        }
        for member in sorted(group.members, key=lambda member: (member.client, member.id))
    ]
    return {
        "stage": stage,
        "group": group.name,
        "state": group.state,
        "members": members,
        "partitions": len(every),
        "unowned": len(every - owned),
        "lag": sum(now.waiting(stage, place) for place in places),
        "oldest_waiting_seconds": _oldest(stage, places, now),
        "read_per_second": _rate(now, before, lambda sample: sum(sample.position(stage, p) for p in places)),
        "arriving_per_second": _rate(now, before, lambda sample: sum(sample.ends[p] for p in places)),
        "delayed": sum(now.waiting(stage, place) for place in every - set(places)),
    }


def _delays(stage: str, topics: Sequence[str], now: Sample) -> list[dict[str, Any]]:
    rows = []
    for topic in topics:
        seconds = delay_of(topic)
        if seconds is None:
            continue
        places = _places([topic], now, delayed=True)
        heads = (now.heads.get((stage, place)) for place in places)
        due = min((head.due for head in heads if head is not None and head.due is not None), default=None)
        rows.append(
            {
                "stage": stage,
                "topic": topic,
                "delay_seconds": seconds,
                "waiting": sum(now.waiting(stage, place) for place in places),
                "read": any(member.owns & {*places} for member in now.groups[stage].members),
                "next_due_at": None if due is None else _iso(due),
                "next_due_in_seconds": None if due is None else round(due - now.at, 3),
            }
        )
    return sorted(rows, key=lambda row: row["delay_seconds"])


def _partitions(stage: str, topics: Sequence[str], now: Sample) -> list[dict[str, Any]]:
    owners = {place: member for member in now.groups[stage].members for place in member.owns}
    rows = []
    for delayed in (False, True):
        for place in _places(topics, now, delayed=delayed):
            owner, head = owners.get(place), now.heads.get((stage, place))
            rows.append(
                {
                    "stage": stage,
                    "topic": place.topic,
                    "partition": place.partition,
                    "committed": now.committed[stage].get(place),
                    "end": now.ends[place],
                    "lag": now.waiting(stage, place),
                    "oldest_waiting_seconds": None if head is None else _age(now, head.written),
                    "client": owner.client if owner else "",
                    "host": owner.host if owner else "",
                }
            )
    return rows


def _places(topics: Sequence[str], now: Sample, *, delayed: bool) -> list[Place]:
    wanted = {topic for topic in topics if (delay_of(topic) is not None) is delayed}
    return sorted(place for place in now.ends if place.topic in wanted)


def _oldest(stage: str, places: Sequence[Place], now: Sample) -> float | None:
    heads = (now.heads.get((stage, place)) for place in places)
    return max((_age(now, head.written) for head in heads if head is not None), default=None)


def _age(now: Sample, written: float) -> float:
    # Clocks differ: a record from the future has waited for no time.
    return max(0.0, round(now.at - written, 3))


def _rate(now: Sample, before: Sample | None, count: Callable[[Sample], int]) -> float | None:
    if before is None or now.at <= before.at:
        return None
    return max(0.0, round((count(now) - count(before)) / (now.at - before.at), 1))


def _iso(seconds: float) -> str:
    # A foreign record may be due after the last year that a datetime holds.
    return (
        datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
