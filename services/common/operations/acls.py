"""The least that each program must be allowed to do in Kafka. Pure.

Kafka's StandardAuthorizer denies what no rule allows. An idempotent producer needs no rule of its own: since
Kafka 3.0 (KIP-679) it is enough to write any topic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from services.common.kafka.topics import (
    EVENT_TOPICS,
    MAIL_FAILED,
    MAIL_SENT,
    TASK_CANCELLED,
    TASK_CREATED,
    Names,
)
from services.common.stages import STAGES

__all__ = ["PROGRAMS", "Acl", "kafka_acls_options", "required_acls"]

PROGRAMS: Final = ("api", *STAGES, "operator", "topics")
"""The services, the operator's commands, and `postroad topics`, which creates and changes topics."""

_API_WRITES = (TASK_CREATED, TASK_CANCELLED, MAIL_SENT, MAIL_FAILED)


@dataclass(frozen=True, slots=True)
class Acl:
    """One resource on which a program may do these operations. Both are in Kafka's own words.

    With the pattern `prefixed`, `name` stands for all names that begin with it.
    """

    program: str
    resource: Literal["topic", "group"]
    name: str
    operations: tuple[str, ...]
    pattern: Literal["literal", "prefixed"] = "literal"


def required_acls(topic_prefix: str = "") -> Sequence[Acl]:
    """Return what each of PROGRAMS needs in the installation with this prefix.

    READ and WRITE include DESCRIBE.
    """
    names = Names(topic_prefix)
    found = [*_api(names), *_operator(names), *_topics(names)]
    for stage in STAGES:
        found += _stage(names, stage)
    return sorted(found, key=lambda acl: PROGRAMS.index(acl.program))


def kafka_acls_options(acl: Acl, principal: str) -> list[str]:
    """Return the arguments of kafka-acls.sh that add a rule for a principal such as `User:postroad-api`."""
    pattern = ["--resource-pattern-type", "prefixed"] if acl.pattern == "prefixed" else []
    operations = [part for operation in acl.operations for part in ("--operation", operation)]
    return ["--add", "--allow-principal", principal, *operations, f"--{acl.resource}", acl.name, *pattern]


def _topic_acls(names: Names, program: str, reads: Sequence[str], writes: Sequence[str]) -> Iterator[Acl]:
    for topic in EVENT_TOPICS:
        operations = [word for word, topics in (("READ", reads), ("WRITE", writes)) if topic in topics]
        if operations:
            yield Acl(program, "topic", names.topic(topic), tuple(operations))


def _api(names: Names) -> Iterator[Acl]:
    # Watch reads all events, by a consumer that joins no group. The committed offsets of the status stage say
    # what the tables hold.
    yield from _topic_acls(names, "api", EVENT_TOPICS, _API_WRITES)
    yield Acl("api", "group", names.group("watch"), ("DESCRIBE",))
    yield Acl("api", "group", names.group("status"), ("DESCRIBE",))


def _stage(names: Names, stage: str) -> Iterator[Acl]:
    spec = STAGES[stage]
    yield from _topic_acls(names, stage, spec.reads, spec.writes)
    if spec.delays_setting:
        # Another delay needs no other rule.
        yield Acl(stage, "topic", names.topic(f"{stage}.delay."), ("READ", "WRITE"), "prefixed")
    yield Acl(stage, "topic", names.dead(stage), ("WRITE",))
    yield Acl(stage, "group", names.group(stage), ("READ",))


def _operator(names: Names) -> Iterator[Acl]:
    yield from _topic_acls(names, "operator", EVENT_TOPICS, EVENT_TOPICS)
    for stage, spec in STAGES.items():
        if spec.delays_setting:
            yield Acl("operator", "topic", names.topic(f"{stage}.delay."), ("READ", "WRITE"), "prefixed")
        # `dead purge` deletes records, whose values may be mails.
        yield Acl("operator", "topic", names.dead(stage), ("READ", "WRITE", "DELETE"))
        yield Acl("operator", "group", names.group(stage), ("DESCRIBE",))
    yield Acl("operator", "group", names.ungrouped, ("DESCRIBE",))


def _topics(names: Names) -> Iterator[Acl]:
    does = ("CREATE", "DESCRIBE", "ALTER", "DESCRIBE_CONFIGS", "ALTER_CONFIGS")
    for topic in EVENT_TOPICS:
        yield Acl("topics", "topic", names.topic(topic), does)
    for stage, spec in STAGES.items():
        yield Acl("topics", "topic", names.dead(stage), does)
        if spec.delays_setting:
            yield Acl("topics", "topic", names.topic(f"{stage}.delay."), does, "prefixed")
            # The delays that a stage's members read are those in use.
            yield Acl("topics", "group", names.group(stage), ("DESCRIBE",))
