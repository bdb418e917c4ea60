"""A Watch that outlives its connections: it goes on by its token, and tells nothing twice."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

import grpc

from postroad.v1 import task_service_pb2 as pb
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.cli.errors import FAILED, Failure
from services.cli.tasks import SETTLED, change_row, task_row
from services.cli.terminal import say

__all__ = ["Seen", "Watching"]

# A stream that these end is taken up again: the api drains, restarts, or sheds a slow reader.
_PASSING: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN", "CANCELLED"})
_LONGEST_PAUSE: Final = 5.0


class Seen:
    """Remembers the last changes told, to tell none again after a stream was taken up."""

    def __init__(self, most: int = 20_000) -> None:
        self._keys: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._most = most

    def new(self, row: Mapping[str, Any]) -> bool:
        """Whether this row was not there before."""
        task, change = row["task"], row["change"] or {}
        key = (task["id"], task["status"], task["updated_at"], *map(change.get, ("at", "kind", "attempt")))
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return True


class Watching:
    """The messages of a Watch. `asked` are the request's fields; `timeout` seconds bound all of it."""

    def __init__(
        self, channel: grpc.Channel, asked: Mapping[str, Any], resume: str = "", timeout: float | None = None
    ) -> None:
        self._stub, self._asked, self._token = TaskServiceStub(channel), dict(asked), resume
        self._end = None if timeout is None else time.monotonic() + timeout
        self._seen = Seen()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield `{task, change, resume_token}` for each message that has a task; blocks between them.

        A stream that breaks is taken up where it was, as long as it takes; the first one must come about.
        Raises grpc.RpcError, and Failure at the timeout.
        """
        pause, stood = 0.2, False
        while True:
            try:
                for message in self._stub.Watch(self._request(), timeout=self._left()):
                    if not stood and pause > 0.2:
                        say("postroad: the api is back")
                    pause, stood = 0.2, True
                    self._token = message.resume_token or self._token
                    if message.HasField("task") and self._seen.new(row := _row(message)):
                        yield row
                said = "the api ended the stream"
            except grpc.RpcError as error:
                code = error.code().name
                if code == "DEADLINE_EXCEEDED" and self._left() is not None:
                    raise Failure("not settled in time", FAILED) from None
                if code not in _PASSING or not self._token:
                    raise
                said = "the api is away"
            if stood:
                say(f"postroad: {said}; going on when it is back")
            stood = False
            time.sleep(min(pause, self._left() or pause))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def settled(self, row: Mapping[str, Any]) -> bool:
        """Whether the task has reached an end."""
        return row["task"]["status"] in SETTLED

    def _request(self) -> pb.WatchRequest:
        return pb.WatchRequest(**self._asked, resume_token=self._token)

    def _left(self) -> float | None:
        return None if self._end is None else max(0.001, self._end - time.monotonic())


def _row(message: pb.WatchResponse) -> dict[str, Any]:
    change = change_row(message.change) if message.HasField("change") else None
    return {"task": task_row(message.task), "change": change, "resume_token": message.resume_token}
