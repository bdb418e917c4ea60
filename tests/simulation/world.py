"""What all simulated servers share: outages, the faults of operations, violations, the trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tests.simulation.plan import Fault
from tests.simulation.process import Process
from tests.simulation.scheduler import Scheduler

__all__ = ["World"]


class World:
    """The scheduler, the outages, the faults that wait for an operation, the violations and the trace."""

    def __init__(self, scheduler: Scheduler, traced: bool = False) -> None:
        self.scheduler = scheduler
        self.violations: list[str] = []
        self.lines: list[str] | None = [] if traced else None
        self.away: dict[str, float] = {"database": 0.0, "kafka": 0.0, "relay": 0.0}
        """The time until which each server is away."""
        self.strike: Callable[[Fault, Process], None] = lambda fault, process: None
        self._counts: Counter[str] = Counter()
        self._waiting: dict[tuple[str, int], list[Fault]] = {}

    @property
    def now(self) -> float:
        """The seconds since the start of the schedule."""
        return self.scheduler.now

    def up(self, server: str) -> bool:
        """Return whether a server is up."""
        return self.scheduler.now >= self.away[server]

    def await_operation(self, fault: Fault) -> None:
        """Make a fault strike with the nth operation of its kind."""
        self._waiting.setdefault((fault.on, fault.nth), []).append(fault)

    def operation(self, kind: str, process: Process | None) -> str:
        """Count an operation that takes effect now. Return `unheard`, `refused`, `again` or an empty text."""
        self._counts[kind] += 1
        faults = self._waiting.pop((kind, self._counts[kind]), None)
        verdict = ""
        for fault in faults or ():
            self.trace("fault", f"{fault.what} with {kind} {fault.nth} of {process.name if process else '-'}")
            if fault.what in ("unheard", "refused", "again"):
                verdict = fault.what
            elif process is not None:
                # After the effect, before the answer.
                self.scheduler.after(0, None, self.strike, fault, process)
        return verdict

    def violation(self, text: str) -> None:
        """Record a violation."""
        self.trace("VIOLATION", text)
        if text not in self.violations:
            self.violations.append(text)

    def trace(self, who: str, text: str) -> None:
        """Add a line to the trace if there is one."""
        if self.lines is not None:
            self.lines.append(f"{self.scheduler.now:11.4f}  {who:<12} {text}")
