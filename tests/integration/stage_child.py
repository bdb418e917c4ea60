"""A stage in a process of its own, for the tests that kill or freeze it.

It publishes mx.ok for each task after `CHILD_SECONDS`. It notes in `CHILD_JOURNAL` which tasks it has begun
and which it has handled.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from services.common.config import Settings
from services.common.stage.service import StageService, run_stage
from services.common.stage.types import Outcome, Record, Stage
from services.common.stages import STAGES
from tests.integration.stage_kit import passed_on

VALIDATOR = STAGES["validator"]
JOURNAL = Path(os.environ.get("CHILD_JOURNAL", os.devnull))
SECONDS = float(os.environ.get("CHILD_SECONDS", "0"))


async def build(settings: Settings) -> StageService:
    async def handle(record: Record) -> Outcome:
        journal.write(f"begun {record.event.epoch}\n")
        await asyncio.sleep(SECONDS)
        journal.write(f"handled {record.event.epoch}\n")
        return passed_on(record)

    return StageService(Stage.of(VALIDATOR, handle=handle, delays=(1, 2)), settings)


if __name__ == "__main__":
    journal = JOURNAL.open("a", buffering=1)
    run_stage(VALIDATOR, build)
