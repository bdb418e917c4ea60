"""What Watch costs and how far it is behind: `python -m tests.bench.watch [--watchers N] [--rate R]`.

First it measures the api and Kafka with nothing to do, without watchers and with N of them. Then tasks come
at R a second, shared out among the watchers by a label. Every watcher must hear of each change of its tasks,
in order; how far behind the fold that is shows by a sample of tasks, whose timelines are read from the
database every few milliseconds. It fails where a change is missing or out of order, where the 99th percentile
is beyond 100 ms, or where idle watchers cost a hundredth of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import uvloop

from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from services.common.database import engine_of, marks, transaction
from tests.bench.load import BODY
from tests.bench.road import quantiles, stack
from tests.bench.usage import usage

_LABEL = "watcher"
_LIFE = ["created", "mx_ok", "sent"]
_BATCH = 5
_SAMPLED = 20
_DEADLINE = 60.0
_MOST_BEHIND_MS, _MOST_IDLE_CORES = 100.0, 0.01


class Watcher:
    """One stream and what it told: by task the kinds in their order, and when each came."""

    def __init__(self, stub: rpc.TaskServiceAsyncStub, number: int, sample: Sample | None) -> None:
        self._call = stub.Watch(pb.WatchRequest(labels={_LABEL: str(number)}))
        self._sample = sample
        self.kinds: dict[str, list[str]] = defaultdict(list)
        self.after_event: list[float] = []

    async def stand(self) -> None:
        await self._call.read()

    async def listen(self) -> None:
        message: Any
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                now = time.time()
                if not message.HasField("change"):
                    continue
                self.kinds[message.task.id].append(message.change.kind)
                self.after_event.append(now - message.change.at.ToNanoseconds() / 1e9)
                if self._sample is not None:
                    self._sample.told(message.task.id, message.change.kind, now)
        except asyncio.CancelledError:
            self._call.cancel()


class Sample(threading.Thread):
    """Reads the timelines of every so many tasks, again and again, to see when each line is there."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._engine = engine_of(url)
        self._open: dict[bytes, set[str]] = {}
        self._told: dict[tuple[bytes, str], float] = {}
        self._folded: dict[tuple[bytes, str], float] = {}
        self.stopping = False

    def told(self, id_: str, kind: str, now: float) -> None:
        key = bytes.fromhex(id_.replace("-", ""))
        if key[-1] % _SAMPLED == 0:
            # The api itself writes the first line.
            if kind == "created":
                self._open[key] = set(_LIFE[1:])
            else:
                self._told[key, kind] = now

    def run(self) -> None:
        while not self.stopping:
            ids = list(self._open)
            if ids:
                self._look(ids)
            time.sleep(0.004)

    def behind(self) -> list[float]:
        """Seconds from a line's being there to its being told; below 0 where the watcher heard first."""
        return [at - self._folded[key] for key, at in self._told.items() if key in self._folded]

    def _look(self, ids: list[bytes]) -> None:
        lines = "SELECT task_id, kind FROM task_events WHERE kind <> 'created' AND task_id IN"
        sql = f"{lines} ({marks(len(ids))})"
        rows = transaction(self._engine, lambda c: c.exec_driver_sql(sql, tuple(ids)).all())
        now = time.time()
        for id_, kind in rows:
            key = bytes(id_)
            self._folded.setdefault((key, kind), now)
            left = self._open.get(key, set())
            left.discard(kind)
            if not left:
                self._open.pop(key, None)


async def _load(target: str, watchers: int, rate: float, seconds: float) -> dict[str, int]:
    """Create tasks at that rate; return the number of its watcher by task."""
    made: dict[str, int] = {}
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = rpc.TaskServiceStub(channel)

        async def create(numbers: range) -> None:
            requests = [
                pb.CreateRequest(
                    data=pb.TaskData(
                        email=f"user{n}@d{n % 50}.ok.test", subject=f"Parcel {n}", body=BODY,
                        labels={_LABEL: str(n % watchers)},
                    )
                )
                for n in numbers
            ]  # fmt: skip
            answer = await stub.BatchCreate(pb.BatchCreateRequest(requests=requests), timeout=30)
            made.update((r.task.id, n % watchers) for r, n in zip(answer.results, numbers, strict=True))

        calls, start = [], time.perf_counter()
        for first in range(0, int(rate * seconds), _BATCH):
            await asyncio.sleep(max(0.0, start + first / rate - time.perf_counter()))
            calls.append(asyncio.create_task(create(range(first, first + _BATCH))))
        await asyncio.gather(*calls)
    return made


def _loader(queue: Any, *arguments: Any) -> None:
    queue.put(uvloop.run(_load(*arguments)))


async def _idle(pids: Path, seconds: float) -> dict[str, float]:
    """Return cores of the api and of Kafka over a while of idling."""
    before = usage(pids)
    await asyncio.sleep(seconds)
    after = usage(pids)
    return {
        name: (after[name].cpu_seconds - before[name].cpu_seconds) / seconds for name in ("api-1", "kafka-1")
    }


async def bench(watchers: int, rate: float, seconds: float, idle: float) -> dict[str, Any]:
    """Return what was measured."""
    with stack() as (folder, env):
        target, pids = env["POSTROAD_API"], folder / "pids"
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()

        async def load(length: float) -> dict[str, int]:
            process = context.Process(target=_loader, args=(queue, target, watchers, rate, length))
            process.start()
            made: dict[str, int] = await asyncio.to_thread(queue.get)
            process.join()
            return made

        # Connections, caches and the JVM's compiler warm up first.
        await load(10)
        await asyncio.sleep(10)
        alone = await _idle(pids, idle)
        sample = Sample(env["POSTROAD_DATABASE_URL"])
        sample.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(target, options) for _ in range(8)]
        all_ = [Watcher(rpc.TaskServiceStub(channels[n % len(channels)]), n, sample) for n in range(watchers)]
        await asyncio.gather(*(watcher.stand() for watcher in all_))
        watched = await _idle(pids, idle)
        listening = [asyncio.create_task(watcher.listen()) for watcher in all_]
        before = usage(pids)
        made = await load(seconds)
        wanted: dict[int, set[str]] = defaultdict(set)
        for id_, number in made.items():
            wanted[number].add(id_)

        def missing() -> int:
            return sum(
                len(_LIFE) - len(watcher.kinds.get(id_, ()))
                for number, watcher in enumerate(all_)
                for id_ in wanted[number]
            )

        end = time.monotonic() + _DEADLINE
        while missing() > 0 and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        after = usage(pids)
        # The fold may be behind.
        await asyncio.sleep(2)
        sample.stopping = True
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening)
        await asyncio.gather(*(channel.close() for channel in channels))
    wrong = sum(
        watcher.kinds[id_] != _LIFE for number, watcher in enumerate(all_) for id_ in wanted[number]
    ) + sum(len(watcher.kinds.keys() - wanted[number]) for number, watcher in enumerate(all_))
    behind = sample.behind()
    spent = after["api-1"].cpu_seconds - before["api-1"].cpu_seconds
    return {
        "tasks": len(made),
        "messages": sum(len(watcher.after_event) for watcher in all_),
        "tasks_told_wrongly": wrong,
        "behind_the_fold_ms": quantiles(behind),
        "behind_the_fold_sampled": len(behind),
        "after_the_event_ms": quantiles([s for watcher in all_ for s in watcher.after_event]),
        "api_cpu_ms_per_task": round(spent / len(made) * 1000, 3),
        "idle_cores_without": {name: round(cores, 4) for name, cores in alone.items()},
        "idle_cores_with": {name: round(cores, 4) for name, cores in watched.items()},
        "idle_cores_of_watchers": round(watched["api-1"] - alone["api-1"], 4),
    }


def main() -> int:
    """Run by the command line; 0 where all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--idle", type=float, default=30)
    given = parser.parse_args()
    found = uvloop.run(bench(given.watchers, given.rate, given.seconds, given.idle))
    print(json.dumps(found, indent=1))
    good = (
        not found["tasks_told_wrongly"]
        and found["behind_the_fold_ms"]["p99"] < _MOST_BEHIND_MS
        and found["idle_cores_of_watchers"] < _MOST_IDLE_CORES
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
