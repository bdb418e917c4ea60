"""The outbox publisher, without Kafka and MySQL."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from services.api.outbox import OutboxRow, created
from services.api.outbox_publisher import OutboxPublisher
from services.common.batching import Batcher
from services.common.database.errors import is_transient


async def test_what_is_left_in_the_outbox_is_logged_without_the_statement() -> None:
    def fail(rows: Sequence[OutboxRow]) -> list[None]:
        raise OperationalError("DELETE " * 7000, None, Exception("gone"))

    deleter: Batcher[OutboxRow, None] = Batcher(fail, shared=is_transient)
    publisher: Any = None
    outbox_publisher = OutboxPublisher(publisher, deleter, 100, 1 << 20)
    with capture_logs() as lines:
        await asyncio.wait_for(outbox_publisher._delete([created(bytes(16))]), 10)
    assert [(line["events"], line["error"]) for line in lines] == [(1, "gone")]
    await deleter.close()
