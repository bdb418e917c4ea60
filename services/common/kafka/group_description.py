"""Descriptions of consumer groups, asked for in a process of its own (describe_group.py says why)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from confluent_kafka import KafkaError, KafkaException

__all__ = ["ConsumerGroup", "GroupDescription", "GroupMember", "describe"]

# So many times a request's timeout the process may take: it starts, connects, asks and ends.
_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One member of a group, and the partitions of each topic that the coordinator has assigned to it."""

    id: str
    client: str
    host: str
    owned: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class ConsumerGroup:
    """A consumer group. `state` is librdkafka's name: STABLE, EMPTY, DEAD (also: never was), ..."""

    state: str
    members: Sequence[GroupMember]


class GroupDescription:
    """One request for the description of these groups, under way from the start. A context manager.

    `config` is the client's, without objects; `timeout` is what a request may take, in seconds, and `member`
    the only member to tell of. Raises OSError where no process can be started.
    """

    def __init__(
        self, config: Mapping[str, Any], groups: Sequence[str], timeout: float, member: str | None = None
    ) -> None:
        self._until = time.monotonic() + _PATIENCE * timeout
        asked = {"config": config, "groups": groups, "timeout": timeout, "member": member}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.common.kafka.describe_group"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # What Popen does not know, it does not flush once it is closed.
        stdin, self._process.stdin = self._process.stdin, None
        assert stdin is not None
        try:
            with stdin:
                json.dump(asked, stdin)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> GroupDescription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def done(self) -> bool:
        """Whether `result` would not block. For a small answer: one that fills the pipe is never done."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() > self._until:
            self._process.kill()
        return False

    def result(self) -> Mapping[str, ConsumerGroup]:
        """Return each group by its name. Blocks until it is there; raises KafkaException."""
        try:
            said, _ = self._process.communicate(timeout=max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer in time")) from None
        if self._process.returncode < 0 or not said:
            # The connection was lost at the wrong moment, and librdkafka has aborted the process.
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "no answer from the group's coordinator"))
        answer = json.loads(said)
        if self._process.returncode:
            raise KafkaException(KafkaError(answer["error"]["code"], answer["error"]["text"]))
        return {
            name: ConsumerGroup(group["state"], [GroupMember(**member) for member in group["members"]])
            for name, group in answer.items()
        }


def describe(config: Mapping[str, Any], groups: Sequence[str], timeout: float) -> Mapping[str, ConsumerGroup]:
    """Return these groups by name, all members told of. Blocks; raises KafkaException and OSError."""
    with GroupDescription(config, groups, timeout) as description:
        return description.result()
