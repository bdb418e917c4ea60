"""Submitting mails: each gets one result, unless it is withdrawn before its message is written."""

import asyncio

import pytest

from services.sender.replies import InDoubt, Rejected, SendResult, Sent
from services.sender.smtp_pool import Limits, OutgoingMail, Relay, SmtpPool, Tls
from tests.integration.smtp.script import (
    FROM,
    MESSAGE,
    TO,
    Conversation,
    Sending,
    pool_for,
    scripted,
    serving,
)


async def test_each_submitted_mail_gets_one_result() -> None:
    async with scripted(serving) as server, pool_for(server, limits=Limits(sessions=3)) as pool:
        mails = [Sending(pool) for _ in range(100)]
        results = [await mail.result() for mail in mails]
        assert {type(result) for result in results} == {Sent}
        assert server.connections == 3
        assert not mails[0].withdraw()
        assert isinstance(mails[0].cut_off(), Sent)


async def test_a_mail_that_would_break_out_is_refused_at_once() -> None:
    pool = SmtpPool(Relay("127.0.0.1", 1, tls=Tls.NONE))
    results: list[SendResult] = []
    with pytest.raises(ValueError, match="envelope"):
        pool.submit(OutgoingMail(FROM, "a b@example.org", MESSAGE, lambda: True, results.append))
    with pytest.raises(ValueError, match="CRLF"):
        pool.submit(OutgoingMail(FROM, TO, b"a\n.\r\n", lambda: True, results.append))
    assert pool.state.opened == pool.state.waiting == 0
    assert results == []


async def test_a_withdrawn_mail_that_waits_is_never_sent() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        begun.set()
        await release.wait()
        await c.say("250 queued")
        await c.mail()
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        first, second, third = Sending(pool), Sending(pool), Sending(pool)
        await asyncio.wait_for(begun.wait(), 20)
        assert second.withdraw()
        release.set()
        assert isinstance(await first.result(), Sent)
        assert isinstance(await third.result(), Sent)
        assert second.results == []
        assert server.connections == 1


async def test_a_mail_withdrawn_in_its_envelope_aborts_its_session() -> None:
    begun = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        begun.set()
        assert await c.drained() == 0

    async with scripted(script) as server, pool_for(server) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(begun.wait(), 20)
        assert mail.withdraw()
        await server.played()
        assert mail.results == []
        assert pool.state.busy == pool.state.idle == 0


@pytest.mark.parametrize("cut", [False, True])
async def test_a_mail_whose_message_was_written_gets_its_result_though_it_is_withdrawn(cut: bool) -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        begun.set()
        await release.wait()
        # A refusal of the session: the mail goes on no second one.
        await c.say("451 4.4.2 timeout")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(begun.wait(), 20)
        assert not mail.withdraw()
        if cut:
            assert isinstance(mail.cut_off(), InDoubt)
            release.set()
        else:
            release.set()
            assert isinstance(await mail.result(), Rejected)
        assert server.connections == 1
        assert len(mail.results) == 1
