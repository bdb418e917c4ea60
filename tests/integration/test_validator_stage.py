"""The validator's process on the real Kafka and the local name server: records in, events out."""

import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Consumer, KafkaError, Producer

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import DECODERS, Event, encode, task_id
from services.common.kafka import topics
from services.common.kafka.admin import apply
from services.common.stages import all_topics
from tests.stack import Infra

# Names of this test alone: no other test and no earlier run has asked for them.
FLAKY = f"{secrets.token_hex(4)}.flaky.test"
VERDICTS = {
    "good.test": "ok",
    "xn--bcher-kva.test": "ok",
    "implicit.test": "ok",
    "v6.test": "ok",
    "mixed.test": "ok",
    "alias.test": "ok",
    "truncated.test": "ok",
    "delay-200.test": "ok",
    FLAKY: "ok",
    "nomail.test": "no_mail_host",
    "deadmx.test": "no_mail_host",
    "barehost.test": "no_mail_host",
    "nullmx.test": "null_mx",
    "dangling.test": "no_such_domain",
    "nosuch.test": "no_such_domain",
    "localmx.test": "unusable_mx",
    "literal.test": "unusable_mx",
    "loopback.test": "unusable_mx",
    "unspecified.test": "unusable_mx",
    "softmx.test": "dns_unavailable",
    "servfail.test": "dns_unavailable",
    "refused.test": "dns_unavailable",
    "timeout.test": "dns_unavailable",
}
DELAYS = (1, 2)


class Pipeline:
    """The topics on both sides of a validator, and the events that it has published."""

    def __init__(self, infra: Infra) -> None:
        self.settings = Settings(
            kafka_bootstrap=infra.bootstrap,
            topic_prefix=infra.topic_prefix(),
            partitions=2,
            validator_delays=DELAYS,
            sender_delays=(1,),
        )
        apply(self.settings, all_topics(self.settings))
        names = topics.Names(self.settings.topic_prefix)
        self.created = names.topic(topics.TASK_CREATED)
        self.dead_topic = names.dead("validator")
        self.producer = Producer({"bootstrap.servers": infra.bootstrap})
        self._consumer = Consumer(
            {
                "bootstrap.servers": infra.bootstrap,
                "group.id": f"{self.settings.topic_prefix}test",
                "auto.offset.reset": "earliest",
            }
        )
        out = (topics.MX_OK, topics.MX_FAILED, topics.MAIL_DEFERRED)
        self._consumer.subscribe([*map(names.topic, out), self.dead_topic])
        self.events: dict[bytes, list[Event]] = defaultdict(list)
        self.dead: list[object] = []

    def create(self, domain: str) -> pb.MailTask:
        """Record a task for a recipient at this domain."""
        key = uuid.uuid4().bytes
        task = pb.MailTask(id=key, email=f"someone@{domain}", domain=domain, subject="Hello", body="text")
        record = encode(pb.TaskCreated(task=task, epoch=3, at_us=time.time_ns() // 1000), "api")
        self.producer.produce(self.created, record.value, record.key, headers=dict(record.headers))
        return task

    def read_until(self, reached: Callable[[], bool], seconds: float = 60) -> None:
        """Collect events until `reached()`. Raises AssertionError after a time."""
        self.producer.flush(10)
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"after {seconds} s: {dict(self.events)}, dead {self.dead}"
            for message in self._consumer.consume(500, 0.2):
                if (error := message.error()) is not None:
                    # A busy broker shows a new topic with a delay.
                    assert error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART, error
                    continue
                if message.topic() == self.dead_topic:
                    self.dead.append(dict(message.headers() or [])["cause"])
                else:
                    bare = str(message.topic()).removeprefix(self.settings.topic_prefix)
                    event = DECODERS[bare](message.value())
                    self.events[task_id(event)].append(event)

    def close(self) -> None:
        self._consumer.close()


@pytest.fixture(scope="module")
def pipeline(infra: Infra) -> Iterator[Pipeline]:
    made = Pipeline(infra)
    yield made
    made.close()


@pytest.fixture(scope="module")
def validator(infra: Infra, pipeline: Pipeline) -> Iterator[subprocess.Popen[bytes]]:
    """One process for all tests; the last one ends it."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")},
        "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
        "POSTROAD_TOPIC_PREFIX": pipeline.settings.topic_prefix,
        "POSTROAD_PARTITIONS": str(pipeline.settings.partitions),
        "POSTROAD_VALIDATOR_DELAYS": ",".join(map(str, DELAYS)),
        "POSTROAD_DNS_SERVERS": infra.dns,
        "POSTROAD_DNS_TIMEOUT": "2",
    }
    process = subprocess.Popen([sys.executable, "-m", "services.validator"], env=environment)
    yield process
    process.kill()
    process.wait()


def test_an_undecodable_record_becomes_a_dead_letter_and_the_stage_goes_on(
    pipeline: Pipeline, validator: subprocess.Popen[bytes]
) -> None:
    no_id = pb.TaskCreated(task=pb.MailTask(email="a@good.test")).SerializeToString()
    garbage = (b"\xff\xff garbage", b"", None, no_id, b"\x00" * 100_000)
    for partition in range(pipeline.settings.partitions):
        for value in garbage:
            pipeline.producer.produce(pipeline.created, value, b"key", partition=partition)
    pipeline.producer.flush(10)
    tasks = [pipeline.create("good.test") for _ in range(20)]
    bad = len(garbage) * pipeline.settings.partitions
    pipeline.read_until(lambda: len(pipeline.dead) >= bad and all(pipeline.events[task.id] for task in tasks))
    assert len(pipeline.dead) == bad
    assert all(pipeline.dead)
    assert all(isinstance(pipeline.events[task.id][0], pb.MxOk) for task in tasks)
    assert validator.poll() is None


def test_each_verdict_becomes_its_event_and_sigterm_drains(
    pipeline: Pipeline, validator: subprocess.Popen[bytes]
) -> None:
    tasks = {domain: pipeline.create(domain) for domain in VERDICTS}
    again = pipeline.create("good.test")

    def settled(task: pb.MailTask) -> list[Event]:
        return [event for event in pipeline.events[task.id] if not isinstance(event, pb.MailDeferred)]

    pipeline.read_until(lambda: all(settled(task) for task in [*tasks.values(), again]))
    assert settled(again)
    for domain, task in tasks.items():
        (event,) = settled(task)
        assert event.epoch == 3
        deferred = [event for event in pipeline.events[task.id] if isinstance(event, pb.MailDeferred)]
        if VERDICTS[domain] == "ok":
            assert isinstance(event, pb.MxOk), (domain, event)
            assert event.task == task
            assert event.hosts
            assert event.attempt == (2 if domain == FLAKY else 1)
        else:
            assert isinstance(event, pb.MxFailed), (domain, event)
            assert event.reason == VERDICTS[domain], (domain, event)
            assert event.detail
            assert event.attempt == (3 if event.reason == "dns_unavailable" else 1)
        assert [one.attempt for one in deferred] == list(range(1, event.attempt))
        for one, delay, following in zip(deferred, DELAYS, [*deferred[1:], event], strict=False):
            assert (one.stage, one.reason) == ("validator", "dns_unavailable")
            assert one.next_attempt_at_us >= one.at_us + delay * 1_000_000
            assert following.at_us >= one.next_attempt_at_us

    validator.send_signal(signal.SIGTERM)
    assert validator.wait(30) == 0
