"""What Watch costs, and its delay: `python -m tests.bench watch [--watchers N] [--rate R] [--cut]`.

First it measures the api and Kafka with nothing to do, without watchers and with N of them. Then it creates R
tasks a second, and a label divides them among the watchers. Every watcher must get each change of its tasks,
in order. To compare with the fold, it reads the timelines of a sample of tasks every few milliseconds.

It fails if a change is missing or out of order, or if the 99th percentile of the delay is above 100 ms. It
also fails if idle watchers cost a hundredth of a core.

With --cut it cuts every stream halfway and resumes all at once twenty seconds later. It then measures the
time until the last of them is live again, and not the delay.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import uvloop

from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from tests.bench.load import BODY
from tests.bench.measure import quantiles
from tests.bench.pipeline import stack
from tests.bench.timelines import LIFE, Sample
from tests.bench.usage import usage

_LABEL = "watcher"
_BATCH = 5
_DEADLINE = 60.0
_AWAY = 20.0
_MOST_BEHIND_MS, _MOST_IDLE_CORES = 100.0, 0.01


class Watcher:
    """One stream and its changes: by task the kinds in their order, and when each came."""

    def __init__(self, stub: rpc.TaskServiceAsyncStub, number: int, sample: Sample | None) -> None:
        self._stub, self._number, self._sample = stub, number, sample
        self._token = ""
        self.live = 0.0
        self._open()
        self.kinds: dict[str, list[str]] = defaultdict(list)
        self.after_event: list[float] = []

    def _open(self) -> None:
        asked = pb.WatchRequest(labels={_LABEL: str(self._number)}, resume_token=self._token)
        self._call = self._stub.Watch(asked)

    def cut(self) -> None:
        """End the stream; `listen` returns."""
        self._call.cancel()

    async def resume(self) -> None:
        """Go on after the last token, as `listen` does."""
        self._open()
        await self.listen()

    async def stand(self) -> None:
        message: Any = await self._call.read()
        self._token = message.resume_token

    async def listen(self) -> None:
        message: Any
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                now = time.time()
                self._token = message.resume_token
                if not message.HasField("change"):
                    # All missed changes come before it.
                    self.live = time.monotonic()
                    continue
                kinds = self.kinds[message.task.id]
                # After a cut some come again.
                if message.change.kind not in kinds:
                    kinds.append(message.change.kind)
                self.after_event.append(now - message.change.at.ToNanoseconds() / 1e9)
                if self._sample is not None:
                    self._sample.streamed(message.task.id, message.change.kind, now)
        except asyncio.CancelledError:
            if not self._call.cancelled():
                self._call.cancel()


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


async def _cut(all_: list[Watcher], listening: list[asyncio.Task[None]], after: float) -> float:
    """Cut all streams, resume them a while later, and return the seconds until all are live again."""
    await asyncio.sleep(after)
    for watcher in all_:
        watcher.cut()
    await asyncio.gather(*listening)
    await asyncio.sleep(_AWAY)
    start = time.monotonic()
    listening[:] = [asyncio.create_task(watcher.resume()) for watcher in all_]
    while min(watcher.live for watcher in all_) < start:
        if time.monotonic() > start + _DEADLINE or any(task.done() for task in listening):
            break
        await asyncio.sleep(0.05)
    late = sum(watcher.live < start for watcher in all_)
    print(f"resumed: {late} of {len(all_)} not live", file=sys.stderr)
    return float("inf") if late else max(watcher.live for watcher in all_) - start


async def bench(watchers: int, rate: float, seconds: float, idle: float, cut: bool) -> dict[str, Any]:
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
        cutting = asyncio.create_task(_cut(all_, listening, seconds / 2)) if cut else None
        made = await load(seconds)
        resumed = await cutting if cutting else 0.0
        wanted: dict[int, set[str]] = defaultdict(set)
        for id_, number in made.items():
            wanted[number].add(id_)

        def missing() -> int:
            return sum(
                len(LIFE) - len(watcher.kinds.get(id_, ()))
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
        watcher.kinds[id_] != LIFE for number, watcher in enumerate(all_) for id_ in wanted[number]
    ) + sum(len(watcher.kinds.keys() - wanted[number]) for number, watcher in enumerate(all_))
    behind = sample.behind()
    spent = after["api-1"].cpu_seconds - before["api-1"].cpu_seconds
    return {
        "tasks": len(made),
        "all_live_again_seconds": round(resumed, 2),
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
    parser.add_argument("--cut", action="store_true")
    given = parser.parse_args()
    found = uvloop.run(bench(given.watchers, given.rate, given.seconds, given.idle, given.cut))
    print(json.dumps(found, indent=1))
    good = (
        not found["tasks_told_wrongly"]
        and (given.cut or found["behind_the_fold_ms"]["p99"] < _MOST_BEHIND_MS)
        and found["all_live_again_seconds"] < _DEADLINE
        and found["idle_cores_of_watchers"] < _MOST_IDLE_CORES
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
