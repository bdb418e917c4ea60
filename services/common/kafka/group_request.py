"""Describes consumer groups, through a process of its own (describe_group.py says why)."""

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

__all__ = ["ConsumerGroup", "GroupMember", "GroupRequest", "describe"]

# How many timeouts of a request the process may take: it starts, connects, asks and ends.
_TIMEOUTS = 3.0


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One member of a group, with the partitions of each topic that the coordinator assigned to it."""

    id: str
    client: str
    host: str
    owned: Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class ConsumerGroup:
    """A consumer group. `state` is librdkafka's name: STABLE, EMPTY, DEAD (it never existed, too), ..."""

    state: str
    members: Sequence[GroupMember]


class GroupRequest:
    """One request to describe these groups; it starts at once. A context manager.

    `config` has the client's settings, without objects. A request may take `timeout` seconds. `member` is the
    id of the only member to describe. Raises OSError where no process can be started.
    """

    def __init__(
        self, config: Mapping[str, Any], groups: Sequence[str], timeout: float, member: str | None = None
    ) -> None:
        self._until = time.monotonic() + _TIMEOUTS * timeout
        request = {"config": config, "groups": groups, "timeout": timeout, "member": member}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.common.kafka.describe_group"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # Popen would flush a stdin that it knows, after it is closed.
        stdin, self._process.stdin = self._process.stdin, None
        assert stdin is not None
        try:
            with stdin:
                json.dump(request, stdin)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> GroupRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process if it still runs, and wait for it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def done(self) -> bool:
        """Return whether `result` would not block. A response that fills the pipe is never done."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() > self._until:
            self._process.kill()
        return False

    def result(self) -> Mapping[str, ConsumerGroup]:
        """Return each group by its name. Blocks until the response is there; raises KafkaException."""
        try:
            response, _ = self._process.communicate(timeout=max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer in time")) from None
        if self._process.returncode < 0 or not response:
            # librdkafka lost its connection and aborted the process.
            raise KafkaException(KafkaError(KafkaError._TRANSPORT, "no answer from the group's coordinator"))
        answer = json.loads(response)
        if self._process.returncode:
            raise KafkaException(KafkaError(answer["error"]["code"], answer["error"]["text"]))
        return {
            name: ConsumerGroup(group["state"], [GroupMember(**member) for member in group["members"]])
            for name, group in answer.items()
        }


def describe(config: Mapping[str, Any], groups: Sequence[str], timeout: float) -> Mapping[str, ConsumerGroup]:
    """Return these groups by name, with all members. Blocks; raises KafkaException and OSError."""
    with GroupRequest(config, groups, timeout) as request:
        return request.result()
