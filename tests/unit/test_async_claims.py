"""The claims for coroutines: after an outage owners store outcomes before others take over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from services.common.deliveries.decide import Claim, Taken, Wait
from services.sender.async_claims import AsyncClaims
from tests.memory_claims import MemoryClaims

ID = bytes(16)


class Away(Exception):
    errno = 2003


def claim(owner: bytes, id_: bytes = ID) -> Claim:
    return Claim(id_, 0, 1, owner * 16, "<a@b>")


@pytest.fixture
async def memory() -> MemoryClaims:
    memory = MemoryClaims(20, hold=False, max_resends=9)
    memory.claim([claim(b"1")])
    memory.expire()
    return memory


@pytest.fixture
async def claims(memory: MemoryClaims) -> AsyncIterator[AsyncClaims]:
    claims = AsyncClaims(memory, owners_first=0.2)
    yield claims
    await claims.close()


async def taken_over(claims: AsyncClaims, owner: bytes = b"2") -> float:
    """Ask until the claim is taken over; return how long (seconds) that took."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.timeout(10):
        while not isinstance(verdict := await claims.claim(claim(owner)), Taken):
            assert verdict == Wait(0.0)
            await asyncio.sleep(0.01)
    assert verdict.doubtful
    return loop.time() - started


async def test_a_new_process_takes_over_nothing_at_first_but_claims_free_tasks(claims: AsyncClaims) -> None:
    assert isinstance(await claims.claim(claim(b"3", b"3" * 16)), Taken)
    assert await taken_over(claims) > 0.15


async def test_after_a_silence_the_owners_come_first_again(claims: AsyncClaims, memory: MemoryClaims) -> None:
    await taken_over(claims)
    memory.expire()
    await asyncio.sleep(0.25)  # longer than `owners_first`
    assert await claims.claim(claim(b"3")) == Wait(0.0)
    assert await taken_over(claims, b"3") > 0.1


async def test_trouble_is_the_databases_error_text_without_the_statement(
    claims: AsyncClaims, memory: MemoryClaims
) -> None:
    memory.errors = [OperationalError("INSERT " * 7000, None, Away("gone"))] * 2
    with capture_logs() as lines:
        asking = asyncio.ensure_future(claims.claim(claim(b"3", b"3" * 16)))
        async with asyncio.timeout(10):
            while claims.trouble is None:  # noqa: ASYNC110 - a state, not an event
                await asyncio.sleep(0.001)
        assert claims.trouble == "gone"
        await asking
    assert [line["error"] for line in lines] == ["gone"]


async def test_after_trouble_the_owners_come_first_again(claims: AsyncClaims, memory: MemoryClaims) -> None:
    await taken_over(claims)
    memory.expire()
    memory.errors = [OperationalError("", None, Away())]
    with pytest.raises(OperationalError):
        await claims.renew([memory.rows[ID]])
    assert claims.trouble is not None
    assert await claims.claim(claim(b"3")) == Wait(0.0)
    assert claims.trouble is None
    assert await taken_over(claims, b"3") > 0.1
