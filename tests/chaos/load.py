"""A steady load of careful and careless clients. It records the answer to each."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc

from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from tests.chaos.history import History
from tests.chaos.recipients import recipient

__all__ = ["Load"]

SUBJECT = "Chaos "
_TIMEOUT = 90.0
_ANSWER = 5.0
# Without an answer, or with one of these, a client does not know what became of its request.
_UNKNOWN = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
_BODY = "Your parcel has left the depot and is on its way to you.\n"


class Load:
    """Creates `rate` tasks a second at the `targets` until `end` is called.

    A careful client has an idempotency key and repeats its Create at any replica until it has an answer. A
    careless client has no key and calls once. Without an answer its task is unknown: it may exist or not.
    """

    def __init__(self, targets: list[str], rate: float, seed: int, history: History) -> None:
        self._rate, self._history = rate, history
        self._rng = random.Random(seed)
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channels = [grpc.aio.insecure_channel(target, options) for target in targets]
        self._stubs = [rpc.TaskServiceStub(channel) for channel in self._channels]
        self._calls: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self.created = 0
        self._answers = asyncio.Condition()
        self._last_answer = 0.0

    async def run(self) -> None:
        """Create tasks until `end` is called, then wait for the answers that are still missing."""
        start = time.monotonic()
        while not self._ended.is_set():
            late = start + self.created / self._rate - time.monotonic()
            if late > 0:
                await asyncio.sleep(late)
            call = asyncio.create_task(self._create(self.created))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            self.created += 1
        if self._calls:
            await asyncio.wait(set(self._calls))
        for channel in self._channels:
            await channel.close()

    def end(self) -> None:
        """Start no more Creates."""
        self._ended.set()

    async def answered(self, since: float, timeout: float) -> float | None:
        """Wait for a Create that succeeds after `since`. Return its time; both are in monotonic seconds.

        Returns None when there is none within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout), self._answers:
                await self._answers.wait_for(lambda: self._last_answer > since)
                return self._last_answer
        except TimeoutError:
            return None

    async def _create(self, number: int) -> None:
        careful = self._rng.random() < 0.6
        email = recipient(number, self._rng)
        body = _BODY * (1800 if self._rng.random() < 0.03 else self._rng.randrange(1, 20))
        request = pb.CreateRequest(
            data=pb.TaskData(email=email, subject=f"{SUBJECT}{number}", body=body),
            idempotency_key=f"chaos-{number}" if careful else "",
        )
        began = time.time()
        end = time.monotonic() + (_TIMEOUT if careful else 0)
        tries, pause = 0, 0.1
        while True:
            tries += 1
            answer = await self._ask(request, number + tries)
            code = answer.get("code", "")
            again = code in _UNKNOWN or code == "RESOURCE_EXHAUSTED"
            if not again or time.monotonic() >= end:
                break
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 1.5)
        if "id" in answer:
            outcome = "acked"
            async with self._answers:
                self._last_answer = time.monotonic()
                self._answers.notify_all()
        elif code in _UNKNOWN or tries > 1:
            outcome = "unknown"
        else:
            outcome = "refused" if code == "RESOURCE_EXHAUSTED" else "error"
        self._history.write(
            "create", number=number, email=email, careful=careful, began=round(began, 3), tries=tries,
            outcome=outcome, **answer,
        )  # fmt: skip

    async def _ask(self, request: pb.CreateRequest, turn: int) -> dict[str, Any]:
        stub = self._stubs[turn % len(self._stubs)]
        try:
            task = await stub.Create(request, timeout=_ANSWER)
        except grpc.aio.AioRpcError as error:
            return {"code": error.code().name, "details": (error.details() or "")[:300]}
        return {"id": task.id}
