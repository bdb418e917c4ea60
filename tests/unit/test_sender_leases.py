"""Leases by the monotonic clock: they end by themselves, last while renewed, and can be lost."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from services.common.deliveries.decide import Delivery
from services.sender.leases import Leases
from services.sender.metrics import SENDER_LEASES_LOST

ROW = Delivery(bytes(16), "sending", 0, 1, 0, b"o" * 16, datetime(2026, 1, 1), 0, 0, "", "", "", "<i@a>")


class Renewals:
    """A clock and a database. Each of its answers takes `takes` seconds."""

    def __init__(self) -> None:
        self.now = 100.0
        self.takes = 0.0
        self.lost: set[bytes] = set()
        self.locked: set[bytes] = set()
        self.error: Exception | None = None
        self.asked: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None

    async def __call__(self, rows: Sequence[Delivery]) -> Sequence[bool | None]:
        self.asked.append(len(rows))
        self.now += self.takes
        self.meanwhile()
        if self.error is not None:
            raise self.error
        return [None if row.owner in self.locked else row.owner not in self.lost for row in rows]


def build() -> tuple[Leases, Renewals]:
    renewals = Renewals()
    return Leases(renewals, 20, lambda: renewals.now), renewals


async def test_a_lease_is_measured_from_before_the_database_was_asked() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=90.0)
    world.now = 109.999
    assert lease.holds()
    world.now = 110.0
    assert not lease.holds()


async def test_a_renewal_counts_from_before_it_was_asked_for() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    world.now, world.takes = 105.0, 12.0
    await leases.renew()
    assert lease.ends == 125.0
    assert world.now == 117.0


async def test_a_renewal_that_fails_leaves_the_lease_to_run_out() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    world.error = OSError("away")
    world.now = 119.0
    with pytest.raises(OSError, match="away"):
        await leases.renew()
    assert lease.holds()
    world.now = 120.0
    assert not lease.holds()
    world.error = None
    await leases.renew()
    assert lease.holds(), "nobody took it meanwhile: the database says it is ours"


async def test_a_claim_that_another_owner_took_is_lost_at_once_and_renewed_no_more() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    other = leases.hold(ROW._replace(owner=b"p" * 16), since=100.0)
    world.lost = {ROW.owner}
    await leases.renew()
    assert not lease.holds()
    assert other.holds()
    await leases.renew()
    assert world.asked == [2, 1]


async def test_a_lease_whose_row_is_locked_stays_as_it_was() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    world.now, world.locked = 105.0, {ROW.owner}
    assert not await leases.renew()
    assert (lease.ends, len(leases)) == (120.0, 1)
    world.locked = set()
    assert await leases.renew()
    assert lease.ends == 125.0


async def test_the_renewal_of_a_locked_row_is_repeated_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sender.leases._RETRY_SECONDS", 0.01)
    leases, world = build()
    leases._seconds = 1.0
    leases.hold(ROW, since=100.0)
    world.locked = {ROW.owner}
    several = asyncio.Event()
    world.meanwhile = lambda: len(world.asked) < 4 or several.set()
    running = asyncio.create_task(leases.run())
    # A renewal each quarter of the lease would make four a second.
    await asyncio.wait_for(several.wait(), 0.9)
    running.cancel()


async def test_a_lease_dropped_is_renewed_no_more() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    leases.drop(lease)
    leases.drop(lease)
    await leases.renew()
    assert world.asked == []
    assert len(leases) == 0


async def test_a_lease_dropped_while_it_was_renewed_was_settled_not_lost() -> None:
    leases, world = build()
    lease = leases.hold(ROW, since=100.0)
    world.lost, world.meanwhile = {ROW.owner}, lambda: leases.drop(lease)
    before = SENDER_LEASES_LOST._value.get()
    await leases.renew()
    assert SENDER_LEASES_LOST._value.get() == before


async def test_run_renews_at_a_quarter_of_the_lease_and_outlives_errors() -> None:
    times: list[float] = []
    loop = asyncio.get_running_loop()

    async def renew(rows: Sequence[Delivery]) -> Sequence[bool]:
        times.append(loop.time())
        if len(times) == 2:
            raise OSError("away")
        if len(times) == 4:
            done.set()
        return [True]

    done = asyncio.Event()
    leases = Leases(renew, 0.4)
    leases.hold(ROW, 0.0)
    started = loop.time()
    running = asyncio.create_task(leases.run())
    await asyncio.wait_for(done.wait(), 10)
    running.cancel()
    gaps = [after - before for before, after in zip([started, *times], times, strict=False)]
    assert all(gap >= 0.09 for gap in gaps)


async def test_a_renewal_that_failed_is_logged_without_its_statement() -> None:
    renewals = Renewals()
    leases = Leases(renewals, 0.01)
    leases.hold(ROW, renewals.now)
    renewals.error = OperationalError("UPDATE " * 7000, None, Exception("gone"))
    with capture_logs() as lines:
        running = asyncio.ensure_future(leases.run())
        async with asyncio.timeout(10):
            while not lines:  # noqa: ASYNC110 - a state, not an event
                await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.wait([running])
    assert lines[0]["error"] == "gone"
