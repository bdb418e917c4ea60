"""How long a rebuild takes: `python -m tests.bench rebuild [--tasks N]`.

It fills the topics directly, with about four events a task. It then rebuilds the tables from nothing, as
after a total loss, and once more to compare them with the topics.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from confluent_kafka import Producer

from postroad.v1 import events_pb2 as pb
from services.api.uuid7 import IdGenerator
from services.common.config import Settings
from services.common.events import Event, encode
from services.common.kafka import admin as kafka_admin
from services.common.migrations import migrate
from services.common.operations.rebuild.report import RebuildReport
from services.common.operations.rebuild.run import rebuild
from services.common.stages import all_topics
from tests.bench.usage import usage
from tests.stack import Infra

__all__ = ["events", "fill"]


class _Phases:
    """How long each phase took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "begin", time.monotonic()

    def total(self, events: int) -> None: ...

    def advance(self, events: int = 1) -> None: ...

    def note(self, text: str) -> None:
        now = time.monotonic()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0) + now - self._since
        self._phase, self._since = text.lstrip("0123456789 "), now

    def __str__(self) -> str:
        self.note("end")
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())


def events(tasks: int) -> Iterator[Event]:
    """Yield what `tasks` tasks give rise to: 7 of 10 are sent, 2 of them after a delay, 3 fail."""
    generator = IdGenerator()
    for number in range(tasks):
        id_, at = generator.new()
        task = pb.MailTask(
            id=id_,
            tenant="default",
            email=f"user{number}@example.test",
            domain="example.test",
            subject=f"Subject {number}",
            body="b" * 500,
            idempotency_key=f"key {number}",
            request_hash=bytes(32),
            created_at_us=at,
        )
        yield pb.TaskCreated(task=task, at_us=at)
        yield pb.MxOk(task=task, attempt=1, at_us=at + 1)
        mail: dict[str, Any] = {"id": id_, "relay": "relay:25", "message_id": f"<{id_.hex()}@postroad>"}
        if number % 5 == 0:
            for attempt in (1, 2, 3, 4):
                yield pb.MailDeferred(
                    stage="sender",
                    attempt=attempt,
                    reason="deferred",
                    reply="451 later",
                    at_us=at + 9,
                    **mail,
                )
        if number % 10 < 7:
            yield pb.MailSent(attempt=5, reply="250 2.0.0 ok", at_us=at + 99, **mail)
        else:
            yield pb.MailFailed(attempt=5, reason="rejected", reply="550 no", at_us=at + 99, **mail)


def fill(settings: Settings, tasks: int) -> int:
    """Put the events of `tasks` tasks on the topics; return how many."""
    producer = Producer(
        {"bootstrap.servers": settings.kafka_bootstrap, "linger.ms": 20, "compression.type": "lz4"}
    )
    count = 0
    for event in events(tasks):
        record = encode(event, "bench")
        while True:
            try:
                producer.produce(
                    settings.topic_prefix + record.topic,
                    record.value,
                    record.key,
                    headers=record.headers,  # type: ignore[arg-type]
                )
                break
            except BufferError:
                producer.poll(0.1)
        count += 1
    assert producer.flush(60) == 0
    return count


def _run(name: str, infra: Infra, settings: Settings, swap_in: bool) -> RebuildReport:
    pids = infra.directory / "pids"
    before, used = usage(pids), time.process_time()
    phases = _Phases()
    report = rebuild(settings, swap_in, phases)
    used = time.process_time() - used
    servers = {
        server: used_by.cpu_seconds - before[server].cpu_seconds for server, used_by in usage(pids).items()
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{name}: {report.seconds:.1f} s, {report.events / report.seconds:,.0f} events/s, {peak} MB at most"
    )
    print(f"  {report.missing} missing, {report.differing} differing, locked {report.locked_ms} ms")
    print(f"  CPU: here {used:.1f} s, MySQL {servers['mysql']:.1f} s, Kafka {servers['kafka-1']:.1f} s")
    print(f"  {phases}")
    return report


def main() -> None:
    """Run the measurement on servers of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    tasks = parser.parse_args().tasks
    # What ends this program ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    infra = Infra(Path(tempfile.mkdtemp(prefix="postroad-")))
    try:
        infra.up("--infra-only")
        url = infra.new_database()
        migrate(url)
        settings = Settings(
            kafka_bootstrap=infra.bootstrap, database_url=url, topic_prefix=infra.topic_prefix()
        )
        kafka_admin.apply(settings, all_topics(settings))
        started = time.monotonic()
        # Another process, so that its memory is not counted.
        with ProcessPoolExecutor(1) as other:
            count = other.submit(fill, settings, tasks).result()
        print(f"{tasks} tasks, {count} events, put there in {time.monotonic() - started:.0f} s")
        assert _run("after a total loss", infra, settings, True).missing == tasks
        assert _run("nothing differs", infra, settings, False).equal
    finally:
        infra.down()


if __name__ == "__main__":
    main()
