"""Runs the api in a process of its own, with its own database and topics."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from postroad.v1 import events_pb2
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api import uuid7
from services.common.config import Settings
from services.common.kafka.topics import EVENT_TOPICS, TASK_CREATED
from tests import forked
from tests.groups import bounds
from tests.stack import Infra

__all__ = ["ApiProcess", "Installation", "eventually", "request"]


def eventually(condition: Callable[[], object], seconds: float = 20) -> object:
    """Return the condition's first true value; raise AssertionError when the time is over without one."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(pause)
        # Frequent questions slow down those that are asked.
        pause = min(1.3 * pause, 0.2)
    return value


def free_port() -> int:
    """Return a port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Installation:
    """A migrated database and event topics that nobody else uses.

    task.created has three partitions, each other topic has `partitions`.
    """

    def __init__(self, infra: Infra, partitions: int = 1) -> None:
        self.infra = infra
        self.database_url = infra.migrated_database()
        self._apis_url = infra.as_user("api", self.database_url)
        self.prefix = infra.topic_prefix()
        self._reader = Consumer({"bootstrap.servers": infra.bootstrap, "group.id": "reader"})
        self._places = {n: TopicPartition(self.prefix + TASK_CREATED, n, 0) for n in range(3)}
        self._records: list[Message] = []
        admin = AdminClient({"bootstrap.servers": infra.bootstrap})
        config = {"max.message.bytes": str(5 << 20)}
        topics = [
            NewTopic(self.prefix + name, 3 if name == TASK_CREATED else partitions, 1, config=config)
            for name in EVENT_TOPICS
        ]
        for created in admin.create_topics(topics).values():
            created.result(30)
        # A broker may answer before its own view of the cluster names a new topic.
        for topic in topics:
            eventually(lambda name=topic.topic: admin.list_topics(name, timeout=10).topics[name].partitions)

    @property
    def environment(self) -> dict[str, str]:
        """The settings that point a service at this installation."""
        return {
            "POSTROAD_KAFKA_BOOTSTRAP": self.infra.bootstrap,
            "POSTROAD_DATABASE_URL": self._apis_url,
            "POSTROAD_TOPIC_PREFIX": self.prefix,
        }

    def settings(self, **values: object) -> Settings:
        """Return these settings for a part that runs in the test's own process."""
        return Settings(
            kafka_bootstrap=self.infra.bootstrap,
            database_url=self._apis_url,
            topic_prefix=self.prefix,
            **values,  # type: ignore[arg-type]
        )

    def published(self) -> list[tuple[events_pb2.TaskCreated, dict[str, bytes]]]:
        """Return the events on task.created so far, with their headers."""
        found = []
        for message in self.records():
            event = events_pb2.TaskCreated.FromString(message.value() or b"")
            assert message.key() == event.task.id
            found.append((event, dict(message.headers() or ())))
        return found  # type: ignore[return-value]

    def published_ids(self) -> Counter[str]:
        """Return how many records each task, by its id, has on task.created so far."""
        return Counter(uuid7.text(event.task.id) for event, _ in self.published())

    def records(self) -> list[Message]:
        """Return the records of task.created so far, each partition's in its order.

        A call reads only the records since the last one.
        """
        places = self._places.values()
        ends = {place.partition: bounds(self._reader, place)[1] for place in places}
        if any(place.offset < ends[place.partition] for place in places):
            self._reader.assign(list(places))
            while any(place.offset < ends[place.partition] for place in places):
                message = self._reader.poll(20)
                assert message is not None
                assert not message.error(), message.error()
                self._records.append(message)
                self._places[message.partition()].offset = message.offset() + 1  # type: ignore[index, operator]
            self._reader.unassign()
        return list(self._records)


def request(number: int = 0, key: str = "", **data: Any) -> CreateRequest:
    """Return a valid Create, apart from what `data` changes."""
    mail = {"email": f"u{number}@shop.test", "subject": f"Parcel {number}", "body": "text"} | data
    return CreateRequest(data=TaskData(**mail), idempotency_key=key)


class HasEnvironment(Protocol):
    """Servers on which an api can run."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name its Kafka, its database and its topics."""


class ApiProcess:
    """`python -m services.api`, ready when the context is entered; SIGTERM at its end, and exit code 0."""

    def __init__(self, installation: HasEnvironment, **environment: str) -> None:
        self.target = f"127.0.0.1:{free_port()}"
        self.http = f"127.0.0.1:{free_port()}"
        self._log = tempfile.NamedTemporaryFile("w+b", suffix=".log")  # noqa: SIM115
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
        given = {"POSTROAD_LISTEN": self.target, "POSTROAD_HTTP_LISTEN": self.http} | environment
        self._environment = clean | dict(installation.environment) | given
        self.process: forked.Process | None = None

    def start(self) -> None:
        """Start the process, whether or not it will become ready."""
        streams = (os.devnull, self._log.name, self._log.name)
        self.process = forked.Process("services.api", [], self._environment, streams)

    def __enter__(self) -> ApiProcess:
        self.start()
        try:
            eventually(self.ready, 30)
        except AssertionError:
            self.kill()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process is not None:
            code = self.stop()
            if kind is None:
                assert code == 0, self.log()
        self._log.close()

    def ready(self) -> bool:
        """Return whether /readyz says so; raise AssertionError if the process has ended."""
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"ended with {code}: {self.log()}"
        try:
            return bool(self.readiness()["status"] in ("ok", "degraded"))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def readiness(self) -> dict[str, Any]:
        """Return what /readyz says; raise OSError unless that is 200."""
        with urllib.request.urlopen(f"http://{self.http}/readyz", timeout=3) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(45)
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def metric(self, name: str) -> float:
        """Return a metric's value, 0 if it is not there (yet)."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=3) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[-1])
        return 0.0

    def log(self) -> str:
        """What the process has written so far."""
        return Path(self._log.name).read_text(errors="replace")
