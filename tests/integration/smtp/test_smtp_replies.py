"""Replies as servers in use write them: readable parts count, and the text is shown."""

import asyncio
from dataclasses import replace

import pytest

from services.sender.replies import InDoubt, NotSent, Phase, Rejected, Sent
from tests.integration.smtp.script import (
    QUICK,
    Conversation,
    Script,
    Sending,
    pool_for,
    result_of,
    scripted,
    send,
)


def after_the_dot(answer: bytes, *, close: bool = True) -> Script:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.raw(answer)
        if close:
            c.close()
        else:
            await c.ended()

    return script


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (b"250 2.0.0 queued as 1\n", "250 2.0.0 queued as 1"),
        (b"\r\n250 2.0.0 queued as 1\r\n", "250 2.0.0 queued as 1"),
        (b"250-2.0.0 queued\n250 as 1\n", "250 2.0.0 queued as 1"),
        (b"250_queued\r\n", "250 _queued"),
        (b"250 " + b"x" * 3000 + b"\r\n", "250 " + "x" * 2044),
        (b"what a nice mail\r\n250 queued\r\n", "250 what a nice mail queued"),
        # The server closes before the reply ends.
        (b"250 queued", "250 queued"),
        (b"250", "250"),
        (b"250-queued\r\n", "250 queued"),
    ],
)
async def test_an_acceptance_after_the_dot_with_a_readable_code_is_no_doubt(
    answer: bytes, reply: str
) -> None:
    result = await result_of(after_the_dot(answer))
    assert isinstance(result, Sent)
    assert result.reply == reply


@pytest.mark.parametrize(
    "answer", [b"554 5.7.1 spam\n", b"554-5.7.1 spam\r\n", b"250-hm\r\n554 5.7.1 spam\r\n"]
)
async def test_a_refusal_after_the_dot_with_a_readable_code_is_no_doubt(answer: bytes) -> None:
    result = await result_of(after_the_dot(answer))
    assert isinstance(result, Rejected)
    assert (result.phase, result.permanent) == (Phase.AFTER_DOT, True)
    assert result.reply.startswith("554 5.7.1 spam")


@pytest.mark.parametrize("answer", [b"25", b"hello\r\n", b"2500 ok\r\n", b"\r\n", b"queued, 250\r\n"])
async def test_a_reply_without_a_code_is_a_doubt_and_its_text_is_shown(answer: bytes) -> None:
    result = await result_of(after_the_dot(answer))
    assert isinstance(result, InDoubt)
    assert answer.decode().strip() in result.cause
    assert result.unparsed == answer.decode().strip()


@pytest.mark.parametrize(
    ("replies", "expected"),
    [(["hello"], "hello"), (["250 ok", "+OK"], "+OK"), (["250 a", "250 b", "250 c"], "250 c")],
)
async def test_a_text_before_the_message_is_shown_though_it_is_no_reply(
    replies: list[str], expected: str
) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say(*replies)
        await c.ended()

    result = await result_of(script)
    assert isinstance(result, NotSent)
    assert (result.unparsed, result.spares_attempt) == (expected, False)


async def test_an_unfinished_reply_after_the_dot_counts_at_the_timeout() -> None:
    result = await result_of(
        after_the_dot(b"250-queued\r\n", close=False), timeouts=replace(QUICK, after_dot=0.3)
    )
    assert isinstance(result, Sent)


async def test_an_aborted_send_still_has_its_reply() -> None:
    answered = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.raw(b"250-queued\r\n")
        answered.set()
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(answered.wait(), 20)
        connection = next(iter(pool._sessions._ready)).connection
        async with asyncio.timeout(20):
            while connection._parser.unfinished is None:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert not mail.withdraw()
        assert isinstance(mail.cut_off(), Sent)


async def test_a_server_that_ends_no_line_with_cr() -> None:
    async def script(c: Conversation) -> None:
        await c.raw(b"220 scripted\n")
        await c.expect("EHLO ")
        await c.raw(b"250-scripted\n250 PIPELINING\n")
        for _ in range(2):
            await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
            await c.raw(b"250 ok\n\n250 ok\n354 go on\n")
            await c.message()
            # The empty line after it is no reply to the next command.
            await c.raw(b"250 queued\n\n")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Sent)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("banner", "expected"),
    [
        (
            b"220-mail.example.org\r\n521 5.7.1 blocked, see https://bl.example/1\r\n",
            "521 5.7.1 blocked, see https://bl.example/1",
        ),
        (b"220-mail.example.org\r\n554-blocked\r\n", "554 blocked"),
        (b"554 blocked, see https://bl.example/1", "554 blocked, see https://bl.example/1"),
        (b"220-mail.example.org\r\n", "220-mail.example.org"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        (b"mail is blocked", "mail is blocked"),
    ],
)
async def test_a_refusing_banner_is_shown_and_nothing_is_sent(banner: bytes, expected: str) -> None:
    async def script(c: Conversation) -> None:
        await c.raw(banner)
        c.half_close()
        assert await c.drained() == 0

    result = await result_of(script)
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)
    assert expected in result.cause


async def test_the_reply_to_ehlo_is_shown_though_helo_gets_none() -> None:
    async def script(c: Conversation) -> None:
        await c.say("220 hi")
        await c.expect("EHLO ")
        await c.say("550 5.7.1 literal not allowed")
        await c.expect("HELO ")
        c.close()

    result = await result_of(script)
    assert isinstance(result, NotSent)
    assert result.cause == "550 5.7.1 literal not allowed"


async def test_a_session_that_ends_while_it_opens_takes_no_mail() -> None:
    async def script(c: Conversation) -> None:
        await c.say("220 hi")
        await c.expect("EHLO ")
        await c.raw(b"250-scripted\r\n")
        c.close()

    result = await result_of(script)
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)
    assert "250-scripted" in result.cause
