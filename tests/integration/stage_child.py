"""A stage in a process of its own, for the tests that kill or stop it.

Passes tasks on after `CHILD_SECONDS` each and appends a line a handled record to `CHILD_JOURNAL`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from services.common.config import Settings
from services.common.events import DECODERS
from services.common.kafka.topics import TASK_CREATED
from services.common.process import main
from services.common.stage.runtime import StageRuntime
from services.common.stage.types import Outcome, Record, Stage
from tests.integration.stage_kit import passed_on

JOURNAL = Path(os.environ.get("CHILD_JOURNAL", os.devnull))
SECONDS = float(os.environ.get("CHILD_SECONDS", "0"))


async def build(settings: Settings) -> StageRuntime:
    async def handle(record: Record) -> Outcome:
        await asyncio.sleep(SECONDS)
        journal.write(f"{record.event.epoch}\n")
        return passed_on(record)

    stage = Stage("validator", [TASK_CREATED], DECODERS, handle=handle, delays=(1, 2))
    return StageRuntime(stage, settings, source="validator")


if __name__ == "__main__":
    journal = JOURNAL.open("a", buffering=1)
    main("validator", build)
