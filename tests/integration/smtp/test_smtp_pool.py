"""The pool: its number of sessions, their age, a relay that is away, and its end."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from services.sender import smtp_sessions
from services.sender.replies import InDoubt, NotSent, Phase, Sent
from services.sender.smtp_opening import open_session
from services.sender.smtp_pool import Limits, PoolClosedError, Relay, SmtpPool, Timeouts, Tls
from services.sender.smtp_session import RelayMemory, Session, UnavailableError
from tests.integration.smtp.script import (
    QUICK,
    Conversation,
    Script,
    Sending,
    pool_for,
    scripted,
    send,
    serving,
    take_mails,
    until,
)


@asynccontextmanager
async def on_port(port: int, script: Script) -> AsyncIterator[None]:
    """A server that starts on a port chosen before."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(Conversation(reader, writer))
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield
    finally:
        listener.close()


async def free_port() -> int:
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port: int = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    return port


# --- Sessions


async def test_many_sends_share_few_sessions() -> None:
    async with scripted(serving) as server, pool_for(server, limits=Limits(sessions=3)) as pool:
        results = await asyncio.gather(*(send(pool) for _ in range(200)))
        assert {type(result) for result in results} == {Sent}
        await until(lambda: pool.state.opened == pool.state.idle == 3)
        assert server.connections == 3
        assert pool.state.busy == pool.state.waiting == 0


async def test_one_after_another_uses_one_session() -> None:
    async with scripted(serving) as server, pool_for(server, limits=Limits(sessions=20)) as pool:
        for _ in range(20):
            assert isinstance(await send(pool), Sent)
        assert server.connections == 1


async def test_a_session_carries_a_limited_number_of_mails() -> None:
    limits = Limits(sessions=1, mails_per_session=4)
    async with scripted(serving) as server, pool_for(server, limits=limits) as pool:
        results = await asyncio.gather(*(send(pool) for _ in range(10)))
        assert {type(result) for result in results} == {Sent}
        assert server.connections == 3
        await server.heard(0, b"QUIT")
        assert sum(line.startswith(b"MAIL") for line in server.conversations[0].heard) == 4


async def test_an_idle_session_is_closed_in_time() -> None:
    limits = Limits(sessions=2, idle=0.2)
    async with scripted(serving) as server, pool_for(server, limits=limits) as pool:
        await asyncio.gather(send(pool), send(pool))
        # The first session may have sent both mails before the second was open.
        await until(lambda: pool.state.opened == 2 and pool.state.idle == 0)
        await server.heard(0, b"QUIT")
        await server.heard(1, b"QUIT")
        assert isinstance(await send(pool), Sent)
        assert server.connections == 3


async def test_another_session_may_replace_a_lost_one() -> None:
    async def one_mail(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()

    async with scripted(one_mail) as server, pool_for(server, limits=Limits(sessions=2)) as pool:
        results = await asyncio.gather(*(send(pool) for _ in range(20)))
        assert {type(result) for result in results} == {Sent}
        assert server.connections == 20


async def test_the_pool_respects_a_relay_that_takes_fewer_sessions() -> None:
    async def full(c: Conversation) -> None:
        await c.say("421 4.7.0 too many connections from you")
        await c.drained()

    async with (
        scripted(serving, serving, full) as server,
        pool_for(server, limits=Limits(sessions=6, backoff=60)) as pool,
    ):
        first, second = asyncio.create_task(send(pool)), asyncio.create_task(send(pool))
        await asyncio.gather(first, second)
        results = await asyncio.gather(*(send(pool) for _ in range(100)))
        assert {type(result) for result in results} == {Sent}
        assert pool.available
        await until(lambda: pool.state.idle == 2)
        # One try for each session that was free to open, not one for each mail.
        assert server.connections <= 6


async def test_a_refused_session_is_tried_again_though_the_others_stay_busy() -> None:
    held = asyncio.Event()

    async def slow(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await held.wait()
        await c.say("250 queued")
        await take_mails(c)

    async def full(c: Conversation) -> None:
        await c.say("421 4.7.0 too many connections from you")
        await c.drained()

    limits = Limits(sessions=2, backoff=0.05)
    async with scripted(slow, full, serving) as server, pool_for(server, limits=limits) as pool:
        first = asyncio.create_task(send(pool))
        await until(lambda: pool.state.busy == 1)
        waiting = [asyncio.create_task(send(pool)) for _ in range(5)]
        results = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert {type(result) for result in results} == {Sent}
        assert server.connections == 3
        held.set()
        assert isinstance(await first, Sent)


async def test_a_closing_session_still_counts() -> None:
    """A relay with one session is never asked for two, not even between one and the next."""
    open_now, most = 0, 0

    async def counting(c: Conversation) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await c.greet("PIPELINING")
        await c.mail()
        await c.expect("QUIT")
        await asyncio.sleep(0.02)
        open_now -= 1
        await c.say("221 bye")

    limits = Limits(sessions=1, mails_per_session=1)
    async with scripted(counting) as server, pool_for(server, limits=limits) as pool:
        for _ in range(5):
            assert isinstance(await send(pool), Sent)
    assert most == 1


async def test_a_withdrawn_mail_passes_its_turn_on() -> None:
    hold, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        hold.set()
        await release.wait()
        await c.say("250 queued")
        await take_mails(c)

    async with scripted(script) as server, pool_for(server) as pool:
        first = Sending(pool)
        await hold.wait()
        second, third = Sending(pool), Sending(pool)
        await until(lambda: pool.state.waiting == 2)
        assert second.withdraw()
        release.set()
        assert isinstance(await first.result(), Sent)
        assert isinstance(await third.result(), Sent)
        assert not second.results
        assert server.connections == 1


# --- While the relay is away


async def test_the_relay_goes_away_and_comes_back() -> None:
    port = await free_port()
    pool = SmtpPool(
        Relay("127.0.0.1", port, tls=Tls.NONE), limits=Limits(sessions=4, backoff=0.02), timeouts=QUICK
    )
    result = await send(pool)
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)
    assert not pool.available
    again = await asyncio.wait_for(send(pool), 20)
    assert again == result or (isinstance(again, NotSent) and again.spares_attempt)
    waiting = [asyncio.create_task(pool.wait_available()) for _ in range(50)]
    async with on_port(port, serving):
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert pool.available
        assert pool.state.trouble is None
        results = await asyncio.gather(*(send(pool) for _ in range(50)))
        assert {type(result) for result in results} == {Sent}
        await pool.close()


async def test_a_session_that_opens_late_brings_the_pool_up() -> None:
    failed = asyncio.Event()

    async def refuses(c: Conversation) -> None:
        await c.say("421 busy")
        await c.drained()

    async def late(c: Conversation) -> None:
        await failed.wait()
        await serving(c)

    limits = Limits(sessions=2, backoff=60)
    async with scripted(refuses, late) as server, pool_for(server, limits=limits) as pool:
        first, second = asyncio.create_task(send(pool)), asyncio.create_task(send(pool))
        done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(done.pop().result(), NotSent)
        assert not pool.available
        failed.set()
        await asyncio.wait_for(pool.wait_available(), 20)
        await asyncio.wait([first, second])
        assert isinstance(await send(pool), Sent)


def opening(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """Have the next sessions fail to open with these errors; later ones open."""
    left = list(errors)

    async def open_or_fail(
        relay: Relay, context: ssl.SSLContext | None, timeouts: Timeouts, memory: RelayMemory
    ) -> Session:
        await asyncio.sleep(0)
        if left:
            raise left.pop(0)
        return await open_session(relay, context, timeouts, memory)

    monkeypatch.setattr(smtp_sessions, "open_session", open_or_fail)


async def test_an_unexpected_error_does_not_end_the_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    away = UnavailableError.during(Phase.CONNECT, "refused", "relay")
    opening(monkeypatch, away, RuntimeError("unexpected"), ValueError("too"))
    async with scripted(serving) as server, pool_for(server) as pool:
        with capture_logs() as logs:
            assert isinstance(await send(pool), NotSent)
            await asyncio.wait_for(pool.wait_available(), 20)
        failed = [(log["log_level"], log["exc_info"]) for log in logs if log["event"] == "relay_check_failed"]
        assert failed == [("error", True)] * 2
        assert isinstance(await send(pool), Sent)


async def test_a_check_that_fails_after_a_session_opened_does_not_end_the_sending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away = UnavailableError.during(Phase.CONNECT, "refused", "relay")
    opens, fails, checks = asyncio.Event(), asyncio.Event(), asyncio.Event()
    calls = 0

    async def open_in_turn(
        relay: Relay, context: ssl.SSLContext | None, timeouts: Timeouts, memory: RelayMemory
    ) -> Session:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(0)
            raise away
        if calls == 2:
            await opens.wait()
            return await open_session(relay, context, timeouts, memory)
        checks.set()
        await fails.wait()
        raise UnavailableError.during(Phase.CONNECT, "timed out", "relay")

    monkeypatch.setattr(smtp_sessions, "open_session", open_in_turn)
    limits = Limits(sessions=2, backoff=0.01)
    async with scripted(serving) as server, pool_for(server, limits=limits) as pool:
        first, second = asyncio.create_task(send(pool)), asyncio.create_task(send(pool))
        assert isinstance(await first, NotSent)
        await asyncio.wait_for(checks.wait(), 20)
        opens.set()
        assert isinstance(await second, Sent)
        fails.set()
        # Enough turns of the loop for the check to end.
        for _ in range(5):
            await asyncio.sleep(0)
        assert pool.available


async def test_a_waiting_send_opens_a_session_after_another_failed_to_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opening(monkeypatch, RuntimeError("unexpected"))
    async with scripted(serving) as server, pool_for(server) as pool:
        fails, waits = asyncio.create_task(send(pool)), asyncio.create_task(send(pool))
        result = await asyncio.wait_for(fails, 20)
        assert isinstance(result, NotSent)
        assert (result.cause, result.spares_attempt) == ("internal error: unexpected", False)
        assert isinstance(await asyncio.wait_for(waits, 20), Sent)


async def test_waiting_sends_end_when_the_relay_goes_away() -> None:
    held = asyncio.Event()

    async def dies(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await held.wait()
        c.reset()

    async def refuses(c: Conversation) -> None:
        await c.say("554 closed for today")
        await c.drained()

    async with scripted(dies, refuses) as server, pool_for(server) as pool:
        sends = [asyncio.create_task(send(pool)) for _ in range(10)]
        await until(lambda: pool.state.waiting == 9)
        held.set()
        results = await asyncio.wait_for(asyncio.gather(*sends), 20)
        assert isinstance(results[0], InDoubt)
        for result in results[1:]:
            assert isinstance(result, NotSent)
            assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)


async def test_the_time_between_tries_grows() -> None:
    tries: list[float] = []

    async def refuses(c: Conversation) -> None:
        tries.append(asyncio.get_running_loop().time())
        await c.say("421 busy")
        await c.drained()

    limits = Limits(sessions=1, backoff=0.05, backoff_max=0.4)
    async with scripted(refuses) as server, pool_for(server, limits=limits) as pool:
        assert isinstance(await send(pool), NotSent)
        await until(lambda: len(tries) >= 6)
        waits = [b - a for a, b in pairwise(tries)]
        # 0.05, 0.1, 0.2, 0.4, 0.4, each with a quarter of jitter.
        assert waits[0] >= 0.03
        assert waits[3] >= 0.3
        assert waits[4] >= 0.3


async def test_a_relay_that_requires_auth_at_mail_is_tried_at_growing_intervals() -> None:
    asked: list[float] = []

    async def wants_auth(c: Conversation) -> None:
        await c.greet("PIPELINING")
        while (line := await c.line()) and line != b"QUIT":
            if line.startswith(b"MAIL"):
                asked.append(asyncio.get_running_loop().time())
                await c.expect("RCPT", "DATA")
                await c.say("530 5.7.0 authentication required", "503 no", "503 no")
            else:
                await c.say("250 ok")
                await c.expect("MAIL", "RCPT", "DATA")
                asked.append(asyncio.get_running_loop().time())
                await c.say("530 5.7.0 authentication required", "503 no", "503 no")
        if line:
            await c.say("221 bye")

    limits = Limits(sessions=1, backoff=0.05, backoff_max=0.4)
    async with scripted(wants_auth) as server, pool_for(server, limits=limits) as pool:
        for _ in range(5):
            result = await send(pool)
            assert isinstance(result, NotSent)
            assert result.spares_attempt
            assert not pool.available
            await asyncio.wait_for(pool.wait_available(), 20)
        waits = [b - a for a, b in pairwise(asked)]
        assert len(waits) == 4
        assert waits[3] >= 0.3


# --- Closing


async def test_closing_says_quit_and_refuses_what_comes_later() -> None:
    async with scripted(serving) as server, pool_for(server, limits=Limits(sessions=3)) as pool:
        await asyncio.gather(*(send(pool) for _ in range(10)))
        await until(lambda: pool.state.idle == 3)
        await pool.close()
        assert pool.state.idle == pool.state.busy == 0
        assert [c.heard[-1] for c in server.conversations] == [b"QUIT"] * 3
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert result.spares_attempt
        with pytest.raises(PoolClosedError):
            await pool.wait_available()


async def test_closing_lets_a_mail_under_way_end() -> None:
    waiting, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        waiting.set()
        await release.wait()
        await c.say("250 queued")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        under_way, queued = asyncio.create_task(send(pool)), asyncio.create_task(send(pool))
        await waiting.wait()
        closing = asyncio.create_task(pool.close(grace=5))
        result = await queued
        assert isinstance(result, NotSent)
        assert result.spares_attempt
        assert not closing.done()
        release.set()
        assert isinstance(await under_way, Sent)
        await closing
        assert server.conversations[0].heard[-1] == b"QUIT"


async def test_closing_aborts_a_send_that_does_not_end() -> None:
    waiting = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        waiting.set()
        await c.drained()

    async with scripted(script) as server, pool_for(server) as pool:
        under_way = asyncio.create_task(send(pool))
        await waiting.wait()
        await pool.close(grace=0.1)
        assert isinstance(await under_way, InDoubt)


async def test_closing_while_the_relay_is_away_leaves_nothing_behind() -> None:
    pool = SmtpPool(Relay("127.0.0.1", await free_port(), tls=Tls.NONE), limits=Limits(backoff=60))
    assert isinstance(await send(pool), NotSent)
    waiting = asyncio.create_task(pool.wait_available())
    await pool.close()
    with pytest.raises(PoolClosedError):
        await waiting
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_does_not_wait_for_a_server_that_does_not_answer_quit() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.drained()

    async with scripted(script) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Sent)
        await asyncio.wait_for(pool.close(), 20)
