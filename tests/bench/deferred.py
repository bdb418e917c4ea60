"""What waiting costs: `python -m tests.bench deferred [--tasks N] [--seconds S]`.

It measures the sender and Kafka with nothing to do. It then produces N deferred tasks to the longest delay
topic, as the stage does, and measures again. It fails if their waiting costs a hundredth of a core or ten
megabytes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from uuid import uuid4

from confluent_kafka import Producer

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import encode
from services.common.kafka import topics
from services.common.kafka.headers import delayed_headers
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import Names
from tests.bench.load import BODY
from tests.bench.pipeline import stack
from tests.bench.usage import Usage, usage

_CORE, _MEGABYTES = 0.01, 10.0


def _put(bootstrap: str, tasks: int, delay: int) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "partitioner": "murmur2_random"})
    topic = Names().delay("sender", delay)
    now_ms = int(time.time() * 1000)
    for number in range(tasks):
        task = pb.MailTask(
            id=uuid4().bytes, email=f"u{number}@d{number % 50}.ok.test", domain=f"d{number % 50}.ok.test",
            subject="Later", body=BODY, created_at_us=now_ms * 1000,
        )  # fmt: skip
        record = encode(pb.MxOk(task=task, attempt=1, at_us=now_ms * 1000), "validator")
        origin = RecordLocation(topics.MX_OK, number % 12, number)
        due = now_ms + delay * 1000 + number
        carried = delayed_headers(record.headers, origin=origin, attempt=2, cause="451 later", due_at_ms=due)
        while True:
            try:
                producer.produce(topic, record.value, record.key, headers=[*carried])
                break
            except BufferError:
                producer.poll(0.1)
    if left := producer.flush(60):
        raise RuntimeError(f"{left} records were not taken")


def _measure(pids: Path, seconds: float) -> tuple[float, float, float]:
    """Return cores of the sender, cores of Kafka and the sender's megabytes over a while of idling."""
    before = usage(pids)
    time.sleep(seconds)
    after = usage(pids)

    def cores(name: str) -> float:
        one, other = before[name], after[name]
        return (other.cpu_seconds - one.cpu_seconds) / seconds

    end: Usage = after["sender-1"]
    return cores("sender-1"), cores("kafka-1"), end.resident_mb


def main() -> int:
    """Run by the command line; 0 where waiting costs nothing to speak of."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    with stack() as (folder, env):
        time.sleep(10)
        delay = max(Settings().sender_delays)
        idle = _measure(folder / "pids", given.seconds)
        _put(env["POSTROAD_KAFKA_BOOTSTRAP"], given.tasks, delay)
        # The heads are looked at once.
        time.sleep(10)
        waiting = _measure(folder / "pids", given.seconds)
    for name, row in (("nothing waits", idle), (f"{given.tasks} wait", waiting)):
        print(f"{name:14} sender {row[0]:6.2%} of a core, Kafka {row[1]:6.2%}, sender {row[2]:6.1f} MB")
    cheap = waiting[0] - idle[0] < _CORE and waiting[2] - idle[2] < _MEGABYTES
    return 0 if cheap else 1


if __name__ == "__main__":
    sys.exit(main())
