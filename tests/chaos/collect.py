"""Collects the state after a run: the task table through the API, the topics, the lag, the dead letters."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import grpc
from confluent_kafka import Consumer, KafkaException, TopicPartition

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from services.common.kafka.topics import EVENT_TOPICS
from services.common.operations.dead_letters.resolution import resolved_offsets
from services.common.stages import STAGES
from tests.chaos.load import SUBJECT
from tests.groups import Offsets, bounds

__all__ = ["Api", "Log", "row_of"]


class Api:
    """Reads the task table through the API. Blocks; retries for a minute while the API is away."""

    def __init__(self, target: str) -> None:
        options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.max_receive_message_length", 64 << 20)]
        self._stub = rpc.TaskServiceStub(grpc.insecure_channel(target, options))

    def tasks(self, **filters: Any) -> list[task_pb2.Task]:
        """Return every task that the filters match."""
        rows: list[task_pb2.Task] = []
        token = ""
        while True:
            page = self._call(self._stub.List, pb.ListRequest(page_size=1000, page_token=token, **filters))
            rows += page.results
            token = page.next_page_token
            if not token:
                return rows

    def get(self, id_: str) -> task_pb2.Task:
        """Return one task with its timeline."""
        task: task_pb2.Task = self._call(self._stub.Get, pb.GetRequest(id=id_))
        return task

    def _call(self, method: Any, request: Any) -> Any:
        end = time.monotonic() + 60
        while True:
            try:
                return method(request, timeout=20)
            except grpc.RpcError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)


def row_of(task: task_pb2.Task) -> dict[str, Any]:
    """Return a task as checker.Row takes it."""
    return {
        "id": task.id,
        "number": int(task.subject.removeprefix(SUBJECT)),
        "email": task.email,
        "status": task.status,
        "reason": task.reason,
        "next_at": task.next_attempt_at.ToMicroseconds() / 1e6 if task.HasField("next_attempt_at") else 0.0,
    }


class Log:
    """Reads the topics. Blocks; raises KafkaException."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "chaos.reader"})

    def close(self) -> None:
        """Close the connections."""
        self._consumer.close()

    def ends(self, topics: Iterable[str]) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the first and the next offset of every partition of these topics."""
        known = self._consumer.list_topics(timeout=20).topics
        return {
            (topic, number): bounds(self._consumer, TopicPartition(topic, number))
            for topic in topics
            if topic in known
            for number in known[topic].partitions
        }

    def topics(self) -> list[str]:
        """Return the names of all topics but Kafka's own."""
        return sorted(name for name in self._consumer.list_topics(timeout=20).topics if name[0] != "_")

    def published(self) -> dict[str, dict[str, int]]:
        """Return the number of records of each task, by event topic."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for record in self._records(EVENT_TOPICS):
            found[record.topic()][str(UUID(bytes=record.key()))] += 1
        return {topic: dict(counts) for topic, counts in found.items()}

    def dead(self) -> list[str]:
        """Return a line for each dead letter: its topic, task, cause and origin."""
        dead_letters = []
        for record in self._records([name for name in self.topics() if name.endswith(".dead")]):
            if resolved_offsets(record.offset(), record.key(), record.value(), record.headers()):
                continue
            headers = dict(record.headers() or [])
            task = (record.key() or b"").hex()
            dead_letters.append(f"{record.topic()} {task}: {headers.get('cause')!r}"
                           f" {headers.get('origin')!r}")  # fmt: skip
        return dead_letters

    def lag(self) -> dict[str, int]:
        """Return how many records each stage has not committed on its topics, delay topics included."""
        lags = {}
        for stage, spec in STAGES.items():
            group = f"postroad.{stage}"
            delays = [name for name in self.topics() if name.startswith(f"{stage}.delay.")]
            with Offsets(self._bootstrap, group) as offsets:
                committed = offsets.committed(offsets.partitions([*spec.reads, *delays]))
            ends = self.ends([*spec.reads, *delays])
            lags[stage] = sum(high - committed.get(at, low) for at, (low, high) in ends.items())
        return lags

    def _records(self, topics: Iterable[str]) -> Iterable[Any]:
        there = {at: bounds for at, bounds in self.ends(topics).items() if bounds[1] > bounds[0]}
        self._consumer.assign([TopicPartition(*at, low) for at, (low, _) in there.items()])
        left = {at: high for at, (_, high) in there.items()}
        end = time.monotonic() + 120
        while left:
            if time.monotonic() > end:
                raise TimeoutError(f"cannot be read: {sorted(left)}")
            for record in self._consumer.consume(1000, 0.5):
                if record.error():
                    raise KafkaException(record.error())
                yield record
                at = record.topic(), record.partition()
                if record.offset() + 1 >= left.get(at, 1 << 62):
                    del left[at]
        self._consumer.unassign()
