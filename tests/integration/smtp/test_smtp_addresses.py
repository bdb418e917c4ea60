"""A relay with several addresses: the client uses the first that answers and remembers dead ones."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from services.sender import smtp_addresses
from services.sender.replies import NotSent, Phase, Sent
from services.sender.smtp_addresses import Addresses, ConnectError, RelayAddress, interleave_families
from services.sender.smtp_pool import Limits, SmtpPool
from tests.integration.smtp.script import Conversation, ScriptedServer, pool_for, scripted, send, until
from tests.integration.smtp.test_smtp_pool import serving

GOOD, DEAD, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@contextmanager
def silent(ip: str, port: int) -> Iterator[None]:
    """Fill an address's queue, so that the kernel drops further connections."""
    with socket.socket() as listener:
        listener.bind((ip, port))
        listener.listen(0)
        with socket.socket() as filling:
            filling.connect((ip, port))
            yield


def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the addresses that are tried from now on."""
    made: list[str] = []

    async def counted(address: RelayAddress, timeout: float) -> socket.socket:
        made.append(address.ip)
        return await connected(address, timeout)

    connected = smtp_addresses._connected
    monkeypatch.setattr(smtp_addresses, "_connected", counted)
    return made


def resolved(pool: SmtpPool, *ips: str) -> None:
    """Have the pool's relay resolve to these addresses; uvloop's own resolver cannot be replaced."""

    async def resolve(host: str, port: int) -> list[RelayAddress]:
        listed = [RelayAddress(socket.AF_INET, (ip, port)) for ip in ips]
        return addresses.order(listed)

    addresses = pool._sessions._memory.addresses
    addresses.resolve = resolve  # type: ignore[method-assign]


async def test_a_silent_address_costs_a_moment_once_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = Limits(sessions=4, idle=0.2)
    async with scripted(serving) as server, pool_for(server, limits=limits) as pool:
        with silent(DEAD, server.port):
            resolved(pool, DEAD, GOOD)
            made = tries(monkeypatch)
            begun = asyncio.get_running_loop().time()
            results = await asyncio.gather(*(send(pool) for _ in range(20)))
            assert {type(result) for result in results} == {Sent}
            assert asyncio.get_running_loop().time() - begun < 15
            assert DEAD in made
            await until(lambda: pool.state.idle == 0)
            made.clear()
            results = await asyncio.gather(*(send(pool) for _ in range(5)))
            assert {type(result) for result in results} == {Sent}
            assert made
            assert DEAD not in made


async def test_an_address_that_refuses_is_skipped_at_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scripted(serving) as server, pool_for(server, limits=Limits(mails_per_session=1)) as pool:
        resolved(pool, DEAD, OTHER, GOOD)
        made = tries(monkeypatch)
        for _ in range(3):
            assert isinstance(await send(pool), Sent)
        assert made == [DEAD, OTHER, GOOD, GOOD, GOOD]


async def test_an_address_whose_server_gives_no_session_comes_last_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def closed(c: Conversation) -> None:
        await c.say("554 closed for today")
        await c.drained()

    async with scripted(serving) as server, pool_for(server) as pool:
        other = ScriptedServer((closed,))
        listener = await asyncio.start_server(other.serve, OTHER, server.port)
        resolved(pool, OTHER, GOOD)
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert (result.phase, result.cause) == (Phase.CONNECT, "554 closed for today")
        await asyncio.wait_for(pool.wait_available(), 20)
        assert isinstance(await send(pool), Sent)
        assert other.connections == 1
        listener.close()


async def test_if_all_addresses_are_dead_each_cause_is_shown_and_the_first_is_retried() -> None:
    async with scripted(serving) as server:
        port = server.port
    addresses = Addresses(delay=0.01)
    listed = [RelayAddress(socket.AF_INET, (ip, port)) for ip in (DEAD, OTHER)]
    for _ in range(2):
        with pytest.raises(ConnectError) as caught:
            await addresses.connect(addresses.order(listed), 5)
        assert DEAD in str(caught.value)
        assert OTHER in str(caught.value)
    with pytest.raises(ConnectError, match="no address"):
        await addresses.connect([], 5)


async def test_a_dead_address_is_tried_again_after_a_while() -> None:
    async with scripted(Conversation.drained) as server:
        listed = [RelayAddress(socket.AF_INET, (ip, server.port)) for ip in (DEAD, GOOD)]
        addresses = Addresses(dead_for=0.0)
        for _ in range(2):
            address, sock = await addresses.connect(addresses.order(listed), 5)
            sock.close()
            assert address.ip == GOOD
            assert addresses.order(listed) == listed
        remembering = Addresses()
        _, sock = await remembering.connect(listed, 5)
        sock.close()
        assert remembering.order(listed) == listed[::-1]


async def test_a_connection_that_is_cancelled_leaves_nothing_behind() -> None:
    async with scripted(serving) as server:
        with silent(DEAD, server.port), silent(OTHER, server.port):
            listed = [RelayAddress(socket.AF_INET, (ip, server.port)) for ip in (DEAD, OTHER)]
            before = asyncio.all_tasks()
            task = asyncio.ensure_future(Addresses(delay=0.01).connect(listed, 60))
            await until(lambda: len(asyncio.all_tasks() - before) >= 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == before


async def test_an_address_that_never_answers_fails_in_time() -> None:
    async with scripted(serving) as server:
        with silent(DEAD, server.port), pytest.raises(ConnectError, match="timed out"):
            await Addresses().connect([RelayAddress(socket.AF_INET, (DEAD, server.port))], 0.1)


def test_families_take_turns_in_the_order_of_the_first() -> None:
    six = [RelayAddress(socket.AF_INET6, (f"2001:db8::{n}", 25, 0, 0)) for n in range(3)]
    four = [RelayAddress(socket.AF_INET, (f"192.0.2.{n}", 25)) for n in range(2)]
    assert interleave_families([*six, *four]) == [six[0], four[0], six[1], four[1], six[2]]
    assert interleave_families([*four, *six]) == [four[0], six[0], four[1], six[1], six[2]]
    assert interleave_families([four[0], four[0]]) == [four[0]]
    assert interleave_families([]) == []
