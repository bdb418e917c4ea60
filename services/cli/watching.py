"""A Watch that outlives its connections: it resumes by its token, and yields no change twice."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import grpc
from tenacity import RetryCallState, Retrying, retry_if_exception

from postroad.v1 import task_service_pb2 as pb
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.cli.errors import FAILED, Failure
from services.cli.tasks import change_row, task_row
from services.cli.terminal import say
from services.common.statuses import FINAL_STATUSES

__all__ = ["RecentChanges", "ResumableWatch"]

# After these codes the watch resumes: the api drains, restarts, or sheds a slow reader.
_RESUMABLE: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", "CANCELLED"})
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 5.0


class RecentChanges:
    """Remembers the last `most` changes, to recognise those that a resumed stream repeats."""

    def __init__(self, most: int = 20_000) -> None:
        self._keys: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._most = most

    def add(self, row: Mapping[str, Any]) -> bool:
        """Remember a row. Returns whether it is new."""
        task, change = row["task"], row["change"] or {}
        key = (task["id"], task["status"], task["updated_at"], *map(change.get, ("at", "kind", "attempt")))
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return True


class _StreamEnded(Exception):
    """The api ended a stream without an error."""


class ResumableWatch:
    """The messages of a Watch.

    `fields` are its request's. `timeout` limits all its streams together (seconds).
    """

    def __init__(
        self, channel: grpc.Channel, fields: Mapping[str, Any], resume: str = "", timeout: float | None = None
    ) -> None:
        self._stub, self._fields, self._token = TaskServiceStub(channel), dict(fields), resume
        self._end = None if timeout is None else time.monotonic() + timeout
        self._recent = RecentChanges()
        self._connected = False
        # Streams that brought no message, since the last message.
        self._failures = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield `{task, change, resume_token}` for each message that has a task. Blocks between them.

        A stream that breaks is resumed, however long that takes. The first one must come about. Raises
        grpc.RpcError, and Failure at the timeout.
        """
        streams = Retrying(
            retry=retry_if_exception(self._can_resume),
            wait=self._pause,
            before_sleep=self._say_lost,
            reraise=True,
        )
        for stream in streams:
            with stream:
                yield from self._read_stream()
                raise _StreamEnded

    def _read_stream(self) -> Iterator[dict[str, Any]]:
        request = pb.WatchRequest(**self._fields, resume_token=self._token)
        try:
            for message in self._stub.Watch(request, timeout=self._left()):
                if not self._connected and self._failures:
                    say("postroad: the api is back")
                self._connected, self._failures = True, 0
                self._token = message.resume_token or self._token
                if message.HasField("task") and self._recent.add(row := _row(message)):
                    yield row
        except grpc.RpcError as error:
            if error.code().name == "DEADLINE_EXCEEDED" and self._end is not None:
                one_task = "id" in self._fields
                raise Failure("not settled in time" if one_task else "the timeout is over", FAILED) from None
            raise

    def _can_resume(self, error: BaseException) -> bool:
        if isinstance(error, grpc.RpcError):
            return bool(self._token) and error.code().name in _RESUMABLE
        return isinstance(error, _StreamEnded)

    def _pause(self, _: RetryCallState) -> float:
        pause: float = min(_FIRST_PAUSE * 2 ** min(self._failures, 8), _LONGEST_PAUSE)
        left = self._left()
        return pause if left is None else min(pause, left)

    def _say_lost(self, state: RetryCallState) -> None:
        if self._connected:
            ended = state.outcome is not None and isinstance(state.outcome.exception(), _StreamEnded)
            reason = "the api ended the stream" if ended else "the api is away"
            say(f"postroad: {reason}; going on when it is back")
        self._connected = False
        self._failures += 1

    def _left(self) -> float | None:
        return None if self._end is None else max(0.001, self._end - time.monotonic())


def is_settled(row: Mapping[str, Any]) -> bool:
    """Return whether the row's task has reached an end."""
    return row["task"]["status"] in FINAL_STATUSES


def _row(message: pb.WatchResponse) -> dict[str, Any]:
    change = change_row(message.change) if message.HasField("change") else None
    return {"task": task_row(message.task), "change": change, "resume_token": message.resume_token}
