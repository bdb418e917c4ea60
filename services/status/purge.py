"""Deletes the bodies of tasks that ended long ago."""

from __future__ import annotations

import asyncio
import random
import time

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from services.common.database.errors import error_text
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.taskstore import purge_bodies
from services.status.metrics import STATUS_BODIES_PURGED

__all__ = ["purge", "purge_forever"]

log = structlog.get_logger(__name__)

# Small, since a purge locks the tasks' rows, and a Retry may wait for one of them.
_BATCH = 200
_EVERY_SECONDS = 60.0


def purge(engine: Engine, retention_seconds: int, now_us: int) -> int:
    """Delete every body whose task ended more than `retention_seconds` before `now_us`; return their number.

    Blocks. Several replicas may purge at once: each skips the rows that another has locked.
    """
    before = from_micros(now_us - retention_seconds * 1_000_000)
    purged = 0
    while count := transaction(engine, lambda connection: purge_bodies(connection, before, _BATCH)):
        purged += count
        STATUS_BODIES_PURGED.inc(count)
    return purged


async def purge_forever(engine: Engine, retention_seconds: int) -> None:
    """Purge about every minute until cancelled, and log errors. 0 seconds: never purge."""
    while retention_seconds:
        await asyncio.sleep(_EVERY_SECONDS * random.uniform(0.5, 1.5))
        try:
            purged = await asyncio.to_thread(purge, engine, retention_seconds, time.time_ns() // 1000)
        except SQLAlchemyError as error:
            log.warning("bodies were not purged", error=error_text(error))
        except Exception:
            log.exception("bodies were not purged")
        else:
            if purged:
                log.info("bodies purged", count=purged)
