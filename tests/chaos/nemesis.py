"""Carries out the faults of a plan, and measures how long the system takes to recover from each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from deploy.local.state import SERVICES
from services.common.stages import STAGES
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.plan import Fault
from tests.chaos.recovery import serves_again
from tests.chaos.system import System

__all__ = ["Nemesis"]

# The promised recovery in seconds: after a killed replica (session timeout 10 + 2), a killed broker, MySQL's
# return.
REPLICA, LEADER, DATABASE = 12.0, 12.0, 5.0
_TIMEOUT = 45.0


class Nemesis:
    """Carries out a plan on `system`. `say` prints a line.

    `slack` is how many seconds beyond the promise a recovery may take before the next fault makes it late.
    """

    def __init__(
        self,
        system: System,
        faults: Sequence[Fault],
        load: Load,
        history: History,
        say: Callable[[str], None],
        *,
        slack: float = 0.0,
    ) -> None:
        self._system, self._faults, self._load = system, faults, load
        self._history, self._say, self._slack = history, say, slack
        self._acting: dict[asyncio.Task[None], Fault] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self.began = self.healed = 0.0
        """Unix seconds: when the plan's clock started, and when the last fault was over."""

    async def run(self) -> None:
        """Carry out the whole plan. Returns when the last fault is over."""
        self.began, began = time.time(), time.monotonic()
        for fault in self._faults:
            await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
            if fault.kind != "scale":
                self._overtake()
            task = asyncio.create_task(self._act(fault))
            self._acting[task] = fault
            task.add_done_callback(self._acting.pop)
        while self._acting:
            done, _ = await asyncio.wait(set(self._acting))
            for task in done:
                task.result()
        self.healed = time.time()
        self._history.write("healed")

    async def close(self) -> None:
        """Record the recoveries that are still being measured. The load must have ended."""
        self._overtake()
        if self._watches:
            await asyncio.wait(set(self._watches))

    def _overtake(self) -> None:
        """End the measurements: after the next fault nobody can tell the two recoveries apart."""
        for watch in list(self._watches):
            watch.cancel()

    async def _act(self, fault: Fault) -> None:
        self._tell("begins", fault)
        do: Callable[[Fault], Awaitable[None]] = getattr(self, f"_{fault.kind}")
        try:
            await do(fault)
        finally:
            self._tell("over", fault)
        if fault.alone and not (fault.kind == "kill" and fault.target.startswith((*STAGES, "kafka"))):
            if fault.kind == "roll" or fault.target == "mysql":
                return
            self._watch(fault, time.time(), None)

    def _tell(self, what: str, fault: Fault) -> None:
        self._history.write(
            what, fault=fault.name, kind=fault.kind, target=fault.target, seconds=fault.seconds
        )
        lasts = f" for {fault.seconds:g} s" if fault.seconds and what == "begins" else ""
        self._say(f"{self._history.now():7.1f}  {fault.name} {what}{lasts}")

    def _watch(
        self, fault: Fault, since: float, limit: float | None, what: str = "served again after"
    ) -> None:
        watch = asyncio.create_task(self._measure(fault, since, limit))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _measure(self, fault: Fault, since: float, limit: float | None) -> None:
        seconds: float | None = None
        gave_up = False
        try:
            at = await serves_again(self._system.targets, since, _TIMEOUT)
            seconds = None if at is None else round(at - since, 2)
            gave_up = at is None
        except asyncio.CancelledError:
            # The next fault came first. The recovery may be late already, but its length is unknown.
            gave_up = limit is not None and time.time() - since > limit + self._slack
        self._recovered(fault, seconds, limit, "served again after", gave_up)

    def _recovered(
        self, fault: Fault, seconds: float | None, limit: float | None, what: str, gave_up: bool = False
    ) -> None:
        self._history.write(
            "recovered", fault=fault.name, served=what, seconds=seconds, limit=limit, gave_up=gave_up
        )
        if seconds is not None:
            self._say(f"{self._history.now():7.1f}  {fault.name}: {what} {seconds:.1f} s")

    # The kinds of faults

    async def _kill(self, fault: Fault) -> None:
        killed = time.time()
        await _do(self._system.kill, fault.target)
        if fault.alone and fault.target.startswith(tuple(STAGES)):
            self._watch(fault, killed, REPLICA)
        elif fault.alone and fault.target.startswith("kafka"):
            self._watch(fault, killed, LEADER)
        await asyncio.sleep(fault.seconds)
        await self._start(fault)

    async def _restart(self, fault: Fault) -> None:
        ended = await _do(self._system.stop, fault.target)
        if not ended:
            self._history.write("unclean", name=fault.target)
            self._say(f"{self._history.now():7.1f}  {fault.target} did not end by itself")
        await self._start(fault)

    async def _start(self, fault: Fault) -> None:
        await _do(self._system.start, fault.target)
        if fault.target == "mysql":
            await self._mysql_back(fault)

    async def _mysql_back(self, fault: Fault) -> None:
        """Measure how long after MySQL's return a Create succeeds, and all partitions are served."""
        back = await _do(self._system.mysql_back)
        since = time.time() - (time.monotonic() - back)
        limit = DATABASE if fault.kind in ("kill", "restart") else None
        if fault.alone:
            self._watch(fault, since, limit)
        answered = await self._load.answered(back, _TIMEOUT)
        seconds = None if answered is None else round(answered - back, 2)
        self._recovered(fault, seconds, limit, "Create answered after", answered is None)

    async def _freeze(self, fault: Fault) -> None:
        await _do(self._system.freeze, fault.target)
        await asyncio.sleep(fault.seconds)
        await _do(self._system.thaw, fault.target)
        if fault.target == "mysql":
            await self._mysql_back(fault)

    async def _cut(self, fault: Fault) -> None:
        await _do(self._system.link, fault.target, fault.kind)
        await asyncio.sleep(fault.seconds)
        await _do(self._system.link, fault.target, "pass")

    _reset = _blackhole = _slow = _cut

    async def _mail(self, fault: Fault) -> None:
        order = fault.detail
        if order == "busy":
            orders: dict[str, object] = {"mail": "451 4.3.2 Busy"}
        elif order in ("refuse", "hang", "421"):
            orders = {"connect": order}
        else:
            # Only for ordinary recipients, since the others have faults of their own.
            name = order if order.startswith("slow") else f"{order}-always"
            rule = {"rcpt": "u*@d*.ok.test", "fault": name, "probability": 0.3}
            orders = {"rules": [rule], "seed": round(fault.at * 10)}
        await _do(lambda: self._system.control_mail(**orders))
        await asyncio.sleep(fault.seconds)
        await _do(self._system.control_mail)

    async def _servfail(self, fault: Fault) -> None:
        await _do(lambda: self._system.control_dns(**{"*": "servfail"}))
        await asyncio.sleep(fault.seconds)
        await _do(self._system.control_dns)

    async def _full(self, fault: Fault) -> None:
        await _do(self._system.fill, fault.target)
        await asyncio.sleep(fault.seconds)
        await _do(self._system.empty, fault.target)
        # A broker exits when its disk is full. The supervisor restarts it, in vain until there is space.
        if fault.target == "mysql":
            await self._mysql_back(fault)

    async def _roll(self, fault: Fault) -> None:
        for service in SERVICES:
            for name in self._system.replicas(service):
                if name not in self._system.replicas(service):
                    continue
                if not await _do(self._system.stop, name):
                    self._history.write("unclean", name=name)
                await _do(self._system.start, name)
                await _do(self._system.wait_ready, name)

    async def _scale(self, fault: Fault) -> None:
        await _do(self._system.scale, fault.target, int(fault.detail))


async def _do(work, *args):  # type: ignore[no-untyped-def]
    return await asyncio.to_thread(work, *args)
