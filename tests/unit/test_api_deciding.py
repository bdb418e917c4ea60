"""What a Cancel and a Retry make of where a task stands: the pure parts."""

from __future__ import annotations

from datetime import datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1.task_service_pb2 import ResolveRequest
from services.api.auth import ANYONE
from services.api.call import Call, Metadata, set_call
from services.api.cancelling import attempts, may_still_be_sent
from services.api.errors import InvalidArgument
from services.api.locked_task import LockedTask
from services.api.task_service import TaskServicer
from services.common.deliveries.decide import Delivery, DeliveryState
from services.common.statuses import FINAL_STATUSES, STATUSES

NOW = datetime(2026, 3, 1)


def delivery(state: DeliveryState, epoch: int = 0, attempt: int = 1) -> Delivery:
    return Delivery(bytes(16), state, epoch, attempt, 0, bytes(16), NOW, 0, 0, "", "", "", "")


def locked_task(status: str, row: Delivery | None = None, epoch: int = 0, made: int = 0) -> LockedTask:
    return LockedTask(status, epoch, made, row, NOW)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("state", [None, *get_args(DeliveryState)])
def test_a_task_lives_while_it_is_under_way_or_a_sender_may_still_send_it(
    status: str, state: DeliveryState | None
) -> None:
    row = None if state is None else delivery(state)
    expected = status in ("pending", "processing") or state in ("sending", "released", "deferred")
    assert may_still_be_sent(locked_task(status, row)) is expected
    assert (status in FINAL_STATUSES) is (status not in ("pending", "processing"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, 1),
        (delivery("deferred", epoch=5, attempt=3), 3),
        (delivery("deferred", epoch=6, attempt=2), 2),
        # Attempts of an epoch before this one are not this one's.
        (delivery("deferred", epoch=4, attempt=3), 1),
        # This one was claimed and given back, or is another's business.
        (delivery("released", epoch=5, attempt=3), 1),
        (delivery("sending", epoch=5, attempt=3), 1),
    ],
)
def test_the_attempts_of_a_cancelled_task_are_those_of_its_epoch(row: Delivery | None, expected: int) -> None:
    assert attempts(locked_task("processing", row, epoch=5, made=1)) == expected


@given(st.integers(0, 1 << 42), st.integers(0, 1 << 42), st.none() | st.integers(0, 1 << 42))
def test_a_new_epoch_is_later_than_all_that_is_known(now_ms: int, epoch: int, claimed: int | None) -> None:
    row = None if claimed is None else delivery("failed", epoch=claimed)
    new = locked_task("failed", row, epoch).next_epoch(now_ms)
    assert new > max(epoch, claimed or 0) or (new == now_ms > epoch)
    assert new >= now_ms
    assert new in (now_ms, epoch + 1, (claimed or 0) + 1)


@pytest.mark.parametrize("resolution", [0, 3])
async def test_a_resolution_without_an_answer_is_refused(resolution: int) -> None:
    service = object.__new__(TaskServicer)
    set_call(Call("default", Metadata(()), 0, ANYONE))
    unused: Any = None
    request = ResolveRequest(id="no id", resolution=resolution)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as refused:
        await service.Resolve(request, unused)
    assert [violation.field for violation in refused.value.violations] == ["id", "resolution"]
