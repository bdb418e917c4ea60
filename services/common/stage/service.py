"""StageService and run_stage: what each service of `services/common/stages.py` runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn

from services.common.config import Settings
from services.common.process import main
from services.common.stage.runtime import StageRuntime
from services.common.stage.types import Stage
from services.common.stages import StageSpec

__all__ = ["StageService", "run_stage"]


class StageService:
    """Runs a stage, and what its service runs beside it.

    A stage that only handles records needs no subclass. A subclass overrides `background`, `close` and
    `problems` for what else its service does, holds and reports.
    """

    def __init__(self, stage: Stage, settings: Settings) -> None:
        self._runtime = StageRuntime(stage, settings, source=stage.name)

    def background(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what runs beside the stage. The service cancels it when the stage has ended."""
        return ()

    async def close(self) -> None:
        """Release what the service holds. The service calls it once the stage has ended."""

    async def run(self) -> None:
        """Run the stage until `stop` was called and the drain is over. Raises what ended it otherwise."""
        background = [asyncio.create_task(work) for work in self.background()]
        try:
            await self._runtime.run()
        finally:
            for task in background:
                task.cancel()
            await self.close()

    def stop(self) -> None:
        """Begin to drain. Call it on the loop's thread; it does not block."""
        self._runtime.stop()

    def problems(self) -> list[str]:
        """Return why the service is not ready. Safe from any thread."""
        return self._runtime.problems()


def run_stage(spec: StageSpec, build: Callable[[Settings], Awaitable[StageService]]) -> NoReturn:
    """Run the service that `build` makes for a stage of the list, and exit.

    It reads the settings, sets up the logs, serves /healthz, /readyz and /metrics, and drains on SIGTERM or
    SIGINT. `build` raises ValueError for a setting that it cannot use. The exit codes are those of
    `process.main`.
    """
    main(spec.name, build)
