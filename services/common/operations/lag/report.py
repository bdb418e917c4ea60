"""Makes the lag report of a sample. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import delay_of
from services.common.operations.lag.sampler import LagSample

__all__ = ["remarks", "report"]

# A stage whose first record waits longer does not keep up (seconds).
_BEHIND = 5.0
_LAST_SECOND = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()


def report(
    reads: Mapping[str, Sequence[str]], now: LagSample, before: LagSample | None, *, partitions: bool
) -> dict[str, Any]:
    """Return `{at, stages, delays}`, and `partitions` where asked for.

    `reads` names the topics of each stage. A delay topic that no replica reads is left over from earlier
    settings. It is left out, unless records wait there or the stage has no replica. Rates are measured from
    the sample `before`, and are None without one. Records on delay topics are not lag.
    """
    reads = {stage: [t for t in topics if _counts(stage, t, now)] for stage, topics in reads.items()}
    found: dict[str, Any] = {
        "at": _iso(now.at),
        "stages": [_stage(stage, topics, now, before) for stage, topics in reads.items()],
        "delays": [row for stage, topics in reads.items() for row in _delays(stage, topics, now)],
    }
    if partitions:
        found["partitions"] = [
            row for stage, topics in reads.items() for row in _partition_rows(stage, topics, now)
        ]
    return found


def remarks(found: Mapping[str, Any]) -> list[str]:
    """Return sentences on what a report means beyond its figures."""
    lines = []
    for row in found["stages"]:
        if row["stage"] == "status" and (row["oldest_waiting_seconds"] or 0) > _BEHIND:
            lines.append(
                "status is behind: until it has caught up, tasks show an older state than they have;"
                " a mail may be out though its task is pending or processing."
            )
        stuck = row["members"] and row["lag"] and row["read_per_second"] == 0
        if row["stage"] == "sender" and stuck and "domains" not in found:
            lines.append(
                "The sender commits nothing: postroad lag --stage sender --domains shows whose mails it has"
                " claimed."
            )
    return lines


def _counts(stage: str, topic: str, now: LagSample) -> bool:
    if delay_of(topic) is None or not (members := now.groups[stage].members):
        return True
    partitions = _partitions_of([topic], now, delayed=True)
    return any(member.owns & {*partitions} for member in members) or any(
        now.waiting(stage, partition) for partition in partitions
    )


def _stage(stage: str, topics: Sequence[str], now: LagSample, before: LagSample | None) -> dict[str, Any]:
    group, partitions = now.groups[stage], _partitions_of(topics, now, delayed=False)
    all_ = {*partitions, *_partitions_of(topics, now, delayed=True)}
    owned = frozenset[TopicPartition]().union(*(member.owns for member in group.members))
    members = [
        {
            "client": member.client,
            "host": member.host,
            "member": member.id,
            "partitions": len(member.owns & all_),
            "lag": sum(now.waiting(stage, one) for one in partitions if one in member.owns),
        }
        for member in sorted(group.members, key=lambda member: (member.client, member.id))
    ]
    return {
        "stage": stage,
        "group": group.name,
        "state": group.state,
        "members": members,
        "partitions": len(all_),
        "unowned": len(all_ - owned),
        "lag": sum(now.waiting(stage, one) for one in partitions),
        "oldest_waiting_seconds": _oldest(stage, partitions, now),
        "read_per_second": _rate(now, before, lambda s: sum(s.position(stage, one) for one in partitions)),
        "arriving_per_second": _rate(now, before, lambda s: sum(s.ends[one] for one in partitions)),
        "delayed": sum(now.waiting(stage, one) for one in all_ - set(partitions)),
    }


def _delays(stage: str, topics: Sequence[str], now: LagSample) -> list[dict[str, Any]]:
    rows = []
    for topic in topics:
        seconds = delay_of(topic)
        if seconds is None:
            continue
        partitions = _partitions_of([topic], now, delayed=True)
        records = (now.oldest.get((stage, one)) for one in partitions)
        due = min((one.due for one in records if one is not None and one.due is not None), default=None)
        rows.append(
            {
                "stage": stage,
                "topic": topic,
                "delay_seconds": seconds,
                "waiting": sum(now.waiting(stage, one) for one in partitions),
                "read": any(member.owns & {*partitions} for member in now.groups[stage].members),
                "next_due_at": None if due is None else _iso(due),
                "next_due_in_seconds": None if due is None else round(due - now.at, 3),
            }
        )
    return sorted(rows, key=lambda row: row["delay_seconds"])


def _partition_rows(stage: str, topics: Sequence[str], now: LagSample) -> list[dict[str, Any]]:
    owners = {partition: member for member in now.groups[stage].members for partition in member.owns}
    rows = []
    for delayed in (False, True):
        for partition in _partitions_of(topics, now, delayed=delayed):
            owner, oldest = owners.get(partition), now.oldest.get((stage, partition))
            rows.append(
                {
                    "stage": stage,
                    "topic": partition.topic,
                    "partition": partition.partition,
                    "committed": now.committed[stage].get(partition),
                    "end": now.ends[partition],
                    "lag": now.waiting(stage, partition),
                    "oldest_waiting_seconds": None if oldest is None else _age(now, oldest.written),
                    "client": owner.client if owner else "",
                    "host": owner.host if owner else "",
                }
            )
    return rows


def _partitions_of(topics: Sequence[str], now: LagSample, *, delayed: bool) -> list[TopicPartition]:
    wanted = {topic for topic in topics if (delay_of(topic) is not None) is delayed}
    return sorted(partition for partition in now.ends if partition.topic in wanted)


def _oldest(stage: str, partitions: Sequence[TopicPartition], now: LagSample) -> float | None:
    records = (now.oldest.get((stage, partition)) for partition in partitions)
    return max((_age(now, one.written) for one in records if one is not None), default=None)


def _age(now: LagSample, written: float) -> float:
    # Clocks differ: a record may seem to come from the future.
    return max(0.0, round(now.at - written, 3))


def _rate(now: LagSample, before: LagSample | None, count: Callable[[LagSample], int]) -> float | None:
    if before is None or now.at <= before.at:
        return None
    return max(0.0, round((count(now) - count(before)) / (now.at - before.at), 1))


def _iso(seconds: float) -> str:
    # A record of another producer may be due after the last year that a datetime holds.
    return (
        datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
