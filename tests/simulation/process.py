"""One operating system process of a schedule."""

from __future__ import annotations

from tests.simulation.loop import Loop
from tests.simulation.scheduler import Scheduler
from tests.simulation.threads import Thread

__all__ = ["Process"]


class Process:
    """One operating system process: a loop and threads, which freeze and die together."""

    def __init__(self, scheduler: Scheduler, name: str, service: str) -> None:
        self.scheduler, self.name, self.service = scheduler, name, service
        self.dead = False
        self.frozen_until = 0.0
        self.loop = Loop(self)
        self.threads: list[Thread] = []
        scheduler.processes.append(self)

    def kill(self) -> None:
        """End it as SIGKILL does."""
        if not self.dead:
            self.dead = True
            for thread in self.threads:
                thread.unwind()
