"""`postroad watch` resumes its stream, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from services.cli.errors import Failure
from services.cli.watching import ResumableWatch


class Broken(grpc.RpcError):
    def __init__(self, code: str) -> None:
        self._code = grpc.StatusCode[code]

    def code(self) -> grpc.StatusCode:
        return self._code


class Api:
    """A channel whose Watch answers with the next of `streams`: messages, and how the stream ends."""

    def __init__(self, *streams: list[pb.WatchResponse | Exception]) -> None:
        self._streams = iter(streams)
        self.tokens: list[str] = []

    def unary_unary(self, *_: Any, **__: Any) -> None:
        pass

    def unary_stream(self, *_: Any, **__: Any) -> Any:
        return self._watch

    def _watch(self, request: pb.WatchRequest, timeout: float | None) -> Iterator[pb.WatchResponse]:
        self.tokens.append(request.resume_token)
        for message in next(self._streams):
            if isinstance(message, Exception):
                raise message
            yield message


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


def message(id_: str, token: str) -> pb.WatchResponse:
    return pb.WatchResponse(task=task_pb2.Task(id=id_, status="pending"), resume_token=token)


def test_a_broken_stream_resumes_by_its_token_and_repeats_no_change(
    waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lost, denied = Broken("UNAVAILABLE"), Broken("UNAUTHENTICATED")
    api = Api([message("a", "t1"), lost], [lost], [lost], [message("a", "t1"), message("b", "t2")], [denied])
    watch = ResumableWatch(api, {}, "t0")  # type: ignore[arg-type]
    rows = watch.rows()
    assert [next(rows)["task"]["id"], next(rows)["task"]["id"]] == ["a", "b"]
    with pytest.raises(Broken) as ended:
        next(rows)
    assert ended.value is denied
    assert api.tokens == ["t0", "t1", "t1", "t1", "t2"]
    assert waits == [0.2, 0.4, 0.8, 0.2]
    assert capsys.readouterr().err.splitlines() == [
        "postroad: the api is away; going on when it is back",
        "postroad: the api is back",
        "postroad: the api ended the stream; going on when it is back",
    ]


def test_a_failing_first_stream_ends_the_watch(waits: list[float]) -> None:
    with pytest.raises(Broken):
        next(ResumableWatch(Api([Broken("UNAVAILABLE")]), {}).rows())  # type: ignore[arg-type]
    assert waits == []


def test_the_pauses_stay_short_however_long_the_api_is_away(waits: list[float]) -> None:
    streams: list[list[pb.WatchResponse | Exception]] = [[Broken("UNAVAILABLE")] for _ in range(2000)]
    with pytest.raises(Broken):
        list(ResumableWatch(Api(*streams, [Broken("NOT_FOUND")]), {}, "t").rows())  # type: ignore[arg-type]
    assert max(waits) == 5.0


@pytest.mark.parametrize(
    ("fields", "says"), [({"id": "a"}, "not settled in time"), ({}, "the timeout is over")]
)
def test_the_timeout_is_a_failure(waits: list[float], fields: dict[str, str], says: str) -> None:
    api = Api([Broken("DEADLINE_EXCEEDED")])
    watch = ResumableWatch(api, fields, "t", timeout=60)  # type: ignore[arg-type]
    with pytest.raises(Failure, match=says):
        next(watch.rows())


def test_a_watch_can_be_left(waits: list[float]) -> None:
    rows = ResumableWatch(Api([message("a", "t1"), message("b", "t2")]), {}).rows()  # type: ignore[arg-type]
    assert next(rows)["task"]["id"] == "a"
    rows.close()  # type: ignore[attr-defined]
