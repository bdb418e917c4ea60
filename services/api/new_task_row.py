"""The row of a new task. Pure.

`fold.delta` makes the row of any event, from any producer, and cuts its texts to their columns. The limits
of the validation are narrower, and most columns of a new task are constants.
"""

from __future__ import annotations

import json

from postroad.v1 import events_pb2
from services.common.database.times import from_micros
from services.common.fold import TaskRow, delta

__all__ = ["row_of_new_task"]

_CONSTANTS = delta(events_pb2.TaskCreated())


def row_of_new_task(event: events_pb2.TaskCreated) -> TaskRow:
    """Return `delta(event)` for the first event of a validated task, at a third of the cost."""
    task, send_at_us = event.task, event.send_at_us
    key, labels = task.idempotency_key, task.labels
    at = from_micros(event.at_us)
    return TaskRow(
        task.id,
        task.tenant,
        key.encode() if key else None,
        task.request_hash or None,
        task.email,
        task.domain,
        task.subject,
        json.dumps(dict(labels), sort_keys=True, separators=(",", ":")) if labels else None,
        at,
        _CONSTANTS.status,
        _CONSTANTS.version,
        0,
        0,
        from_micros(send_at_us) if send_at_us else None,
        "",
        "",
        "",
        at,
    )
