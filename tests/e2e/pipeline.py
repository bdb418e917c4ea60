"""A client of the whole pipeline for end-to-end tests, and what must hold after every run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from confluent_kafka import Consumer, TopicPartition
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from services.common.kafka.group_request import GroupMember
from services.common.stages import STAGES
from tests.groups import Offsets, bounds, describe, leave
from tests.stack import Stack

__all__ = ["SETTLED", "Pipeline", "end_sessions", "members", "until"]

# On a busy machine the database may be silent for seconds. Whoever reads may simply ask again.
_READS = {
    "name": [{"service": "postroad.v1.TaskService", "method": method} for method in ("Get", "List")],
    "retryPolicy": {
        "maxAttempts": 5,
        "initialBackoff": "0.5s",
        "maxBackoff": "4s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}
SETTLED = {"completed", "failed", "uncertain", "cancelled"}


def until(met: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Return the first true value of `met()`; fail and name `what` if there is none in time."""
    end = time.monotonic() + seconds
    pause = 0.02
    while True:
        value = met()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
        # Frequent questions slow down those that are asked.
        pause = min(1.3 * pause, 0.3)


def members(stack: Stack, stage: str) -> Sequence[GroupMember]:
    """Return the members of a stage's group, as its coordinator describes them."""
    return describe(stack.kafka, stack.names.group(stage)).members


def end_sessions(stack: Stack, *replicas: str) -> None:
    """Have frozen or killed replicas of one stage leave their group: their sessions would last 10 s more."""
    stage = replicas[0].rpartition("-")[0]
    # The request is made by hand, in clear.
    for member in () if stack.is_secure else members(stack, stage):
        if member.client in replicas:
            leave(stack.env()["POSTROAD_KAFKA_BOOTSTRAP"], stack.names.group(stage), member.id)


class Pipeline:
    """Creates, reads and checks tasks of one stack. A context manager."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._channel = grpc.insecure_channel(
            stack.env()["POSTROAD_API"],
            [
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.service_config", json.dumps({"methodConfig": [_READS]})),
            ],
        )
        self.stub = rpc.TaskServiceStub(self._channel)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def create(
        self, email: str, subject: str = "Hello", body: str = "It works.", key: str = "", **more: Any
    ) -> str:
        """Create one task and return its id; raises grpc.RpcError."""
        data = pb.TaskData(email=email, subject=subject, body=body, **more)
        task: task_pb2.Task = self.stub.Create(pb.CreateRequest(data=data, idempotency_key=key), timeout=20)
        return task.id

    def create_surely(self, email: str, key: str) -> str:
        """Create one task as a careful client does: repeat it with the same key until an answer comes."""
        end = time.monotonic() + 90
        while True:
            try:
                return self.create(email, key=key)
            except grpc.RpcError as error:
                passing = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)  # type: ignore[attr-defined]
                if not passing or time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def create_many(self, emails: Sequence[str], key: str, threads: int = 16) -> list[str]:
        """Create a task for each address from concurrent careful callers; return the ids."""
        with ThreadPoolExecutor(threads) as pool:
            return list(
                pool.map(lambda pair: self.create_surely(pair[1], f"{key}-{pair[0]}"), enumerate(emails))
            )

    def get(self, id_: str) -> task_pb2.Task:
        """Return the task with its timeline."""
        return self.stub.Get(pb.GetRequest(id=id_), timeout=20)  # type: ignore[no-any-return]

    def list_all(self, page_size: int = 1000, **filters: Any) -> list[task_pb2.Task]:
        """Return every task that the filters take, page by page."""
        rows: list[task_pb2.Task] = []
        token = ""
        while True:
            request = pb.ListRequest(page_size=page_size, page_token=token, **filters)
            page = self.stub.List(request, timeout=20)
            rows += page.results
            token = page.next_page_token
            if not token:
                return rows

    def settled(self, ids: Iterable[str], seconds: float = 60.0) -> dict[str, task_pb2.Task]:
        """Wait until each of these tasks has reached an end; return them by id."""
        wanted = set(ids)
        if not wanted:
            return {}
        # The first 48 bits of an id are its time in milliseconds (RFC 9562, section 5.7).
        since = Timestamp()
        since.FromMilliseconds(int(min(wanted).replace("-", "")[:12], 16) - 1000)

        def rows() -> dict[str, task_pb2.Task]:
            ended = self.list_all(status=sorted(SETTLED), created_from=since)
            found = {row.id: row for row in ended if row.id in wanted}
            return found if len(found) == len(wanted) else {}

        end = time.monotonic() + seconds
        while not (found := rows()):
            if time.monotonic() > end:
                states = Counter(f"{r.status}/{r.reason}" for r in self.list_all() if r.id in wanted)
                raise AssertionError(f"not settled within {seconds:g} s: {states}")
            time.sleep(0.3)
        return found

    def copies(self, ids: Iterable[str]) -> dict[str, int]:
        """Return how often the mail server took each task's mail, by its journal."""
        counted = Counter(entry["message_id"].strip("<>").partition("@")[0] for entry in self.stack.journal())
        return {id_: counted[id_] for id_ in ids}

    def doubts(self, id_: str) -> int:
        """Return how many attempts of a task are on record as in doubt."""
        return sum(entry.kind == "in_doubt" for entry in self.get(id_).timeline)

    def sent_once(self, ids: Iterable[str]) -> None:
        """Fail unless each mail was taken once; a further copy needs an attempt in doubt on record."""
        for id_, copies in self.copies(ids).items():
            assert copies >= 1, f"{id_} is lost"
            assert copies - 1 <= (self.doubts(id_) if copies > 1 else 0), f"{id_} was sent {copies} times"

    def records(self, topic: str) -> list[Any]:
        """Return all present records of a topic; its name comes without the prefix."""
        topic = self.stack.names.topic(topic)
        consumer = Consumer({**self.stack.kafka, "group.id": "e2e-reader"})
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            left, found, starts = {}, [], []
            for number in partitions:
                low, high = bounds(consumer, TopicPartition(topic, number))
                if high > low:
                    left[number] = high
                    starts.append(TopicPartition(topic, number, low))
            consumer.assign(starts)
            end = time.monotonic() + 30
            while left:
                assert time.monotonic() < end, f"{topic} cannot be read"
                for record in consumer.consume(1000, 0.5):
                    assert record.error() is None, record.error()
                    found.append(record)
                    if record.offset() + 1 >= left.get(record.partition(), 1 << 62):
                        del left[record.partition()]
            return found
        finally:
            consumer.close()

    def lag(self) -> dict[str, int]:
        """Return how many records each stage's group has not committed, without delay topics."""
        names = self.stack.names
        lags = {}
        for stage, spec in STAGES.items():
            with Offsets(self.stack.kafka, names.group(stage)) as group:
                committed = group.committed(group.partitions(map(names.topic, spec.reads)))
                bounds = group.bounds(TopicPartition(*at) for at in committed)
            lags[stage] = sum(bounds[at][1] - offset for at, offset in committed.items())
        return lags
