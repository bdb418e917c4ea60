"""The scenarios `stage` and `replicas`: one stage alone on a prepared topic.

The stages before it fill its topics and end. Then it starts, and only it works. The measurement begins when
a tenth of the tasks is done and every replica has partitions, so that it contains no start. Afterwards the
other stages run until every task has ended, and all counts are checked.
"""

from __future__ import annotations

import argparse
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from services.common.kafka import topics
from services.common.stages import STAGES
from tests.bench import load, options, report, throughput
from tests.bench.counts import EVENTS_A_TASK, wait_until_ended, wait_until_settled
from tests.bench.receivers import quick_sink, slow_sink
from tests.bench.servers import Installation, running_servers
from tests.bench.usage import spent

__all__ = ["StageFigures", "metric", "run", "run_replicas"]

_BEFORE = {"validator": ("api",), "sender": ("api", "validator"), "status": ("api", "validator", "sender")}
_OUTPUT = {"validator": topics.MX_OK, "sender": topics.MAIL_SENT}
_RECORDS = {"validator": 1, "sender": 1, "status": EVENTS_A_TASK}
_FIRST = 0.1
_LAST = 0.6
_DEADLINE = 300.0


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What a stage does alone: tasks a second, and CPU a task of each process in microseconds."""

    replicas: int
    tasks: int
    rate: float
    cpu_us: dict[str, float]

    def line(self, name: str) -> str:
        """Return the figures in a few words."""
        cpu = "  ".join(f"{part} {us:.0f}" for part, us in self.cpu_us.items())
        return f"  {name}, {self.replicas} replicas: {self.rate:.0f} tasks/s, us of CPU a task: {cpu}"


def metric(text: str, name: str) -> float:
    """Return the sum of all series of a metric in Prometheus' text form."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _scraped(installation: Installation, stage: str, name: str) -> list[float]:
    found = []
    for address in installation.http(stage):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            found.append(metric(answer.read().decode(), name))
    return found


def _length(installation: Installation, topic: str) -> int:
    """Return how many records a topic has; blocks on Kafka."""
    name = installation.names.topic(topic)
    consumer = Consumer({"bootstrap.servers": installation.servers.bootstrap, "group.id": "bench"})
    try:
        found = consumer.list_topics(name, timeout=15).topics[name].partitions
        parts = [TopicPartition(name, number) for number in found]
        return sum(consumer.get_watermark_offsets(part, timeout=15)[1] for part in parts)
    finally:
        consumer.close()


def _until(condition: Callable[[], bool], what: str, step: float = 0.1) -> None:
    end = time.monotonic() + _DEADLINE
    while not _holds(condition):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} took more than {_DEADLINE:.0f} s")
        time.sleep(step)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except KafkaException:
        # A busy broker has no leader for a moment.
        return False


def _prepare(installation: Installation, stage: str, tasks: int) -> None:
    """Create tasks, let the stages before this one handle them, and end these stages."""
    running = _BEFORE[stage]
    installation.up(**{service: int(service in running) for service in ("api", *STAGES)})
    sent = load.run(throughput.batch(tasks)(installation.targets))
    if sent.errors:
        raise RuntimeError(f"{len(sent.errors)} calls failed: {sent.errors[0]}")
    installation.created += len(sent.called_at)
    last = {"validator": topics.TASK_CREATED, "sender": topics.MX_OK, "status": topics.MAIL_SENT}[stage]
    _until(lambda: _length(installation, last) == installation.created, f"the preparation of {last}")
    for service in running:
        installation.scale(service, 0)


def _is_balanced(installation: Installation, stage: str, replicas: int) -> bool:
    owned = _scraped(installation, stage, "postroad_stage_partitions")
    return len(owned) == replicas and min(owned) > 0


def measured(installation: Installation, stage: str, tasks: int, replicas: int = 1) -> StageFigures:
    """Return the figures of a stage on so many prepared tasks. Blocks until all have ended; checks counts.

    Raises RuntimeError where too few are left when the measurement can begin.
    """
    _prepare(installation, stage, tasks)
    installation.scale(stage, replicas)
    _until(lambda: _is_balanced(installation, stage, replicas), f"the assignment to {replicas} replicas")

    def handled() -> float:
        return sum(_scraped(installation, stage, "postroad_stage_records_total")) / _RECORDS[stage]

    _until(lambda: handled() >= tasks * _FIRST, "a tenth of the tasks")
    before, first, start = installation.usage(), handled(), time.time()
    if first > tasks * _LAST:
        raise RuntimeError(f"{first:.0f} of {tasks} tasks were done when the measurement began: use more")
    if stage == "status":
        end = wait_until_ended(installation)
    else:
        _until(lambda: _length(installation, _OUTPUT[stage]) == installation.created, f"the {stage}", 0.05)
        end = time.time()
    after, done = installation.usage(), tasks - first
    installation.up(**dict.fromkeys(("api", *STAGES), 1))
    wait_until_ended(installation)
    wait_until_settled(installation)
    cpu = {name: round(used / done * 1e6, 1) for name, used in spent(before, after).items() if used}
    return StageFigures(replicas, tasks, round(done / (end - start), 1), cpu)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one stage alone; return its figures."""
    found = {}
    with running_servers(given.database) as servers, quick_sink() as sink:
        throughput.warm_up(servers, sink, given.warm_up)
        for number in range(given.rounds):
            with Installation(servers, sink, **options.settings(given)) as installation:
                one = measured(installation, given.name, given.tasks)
            print(one.line(given.name), flush=True)
            found[f"{given.name}, round {number + 1}"] = asdict(one)
    return found


def run_replicas(given: argparse.Namespace) -> dict[str, Any]:
    """Measure each stage, and unary Creates for the api, with each count of replicas."""
    found: dict[str, Any] = {}
    with running_servers(given.database) as servers, slow_sink(given.milliseconds) as sink:
        throughput.warm_up(servers, sink, given.warm_up)
        for stage in given.stages:
            # Only what the senders do is to wait for the receiver.
            sink.take(given.milliseconds if stage == "sender" else 0)
            rates: dict[int, float] = {}
            for count in given.replicas:
                with Installation(servers, sink, **options.settings(given)) as installation:
                    if stage == "api":
                        loads = {"unary 256 callers": throughput.unary(given.tasks, 256)}
                        [one] = throughput.measured(installation, loads, api=count).values()
                        rates[count], figures = one.create_rate, one.as_json()
                    else:
                        alone = measured(installation, stage, given.tasks, count)
                        print(alone.line(stage), flush=True)
                        rates[count], figures = alone.rate, asdict(alone)
                found[f"{stage}, {count}"] = figures
            fewest = min(rates)
            for count, rate in rates.items():
                linear = report.ratio(rate, rates[fewest] * count / fewest)
                print(f"  {stage}: {count} replicas, {rate:.0f} tasks/s, {linear:.2f} of linear", flush=True)
    return found
