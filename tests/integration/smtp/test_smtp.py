"""One mail over the SMTP client: each phase and reply, with a scripted server, on both event loops."""

import pytest

from services.sender.replies import Phase, Rejected, Sent
from services.sender.smtp_pool import Relay, SmtpPool, Tls
from tests.integration.smtp.script import (
    FROM,
    MESSAGE,
    TO,
    Conversation,
    pool_for,
    result_of,
    scripted,
    send,
)

# --- The ordinary case


async def test_one_command_at_a_time_without_pipelining() -> None:
    async def script(c: Conversation) -> None:
        await c.greet()
        await c.expect(f"MAIL FROM:<{FROM}>")
        await c.say("250 ok")
        await c.expect(f"RCPT TO:<{TO}>")
        await c.say("251 will forward")
        await c.expect("DATA")
        await c.say("354 go on")
        assert await c.message() == MESSAGE
        await c.say("250 2.0.0 queued as 1")
        await c.ended()

    result = await result_of(script)
    assert isinstance(result, Sent)
    assert result.reply == "250 2.0.0 queued as 1"
    assert result.relay.startswith("127.0.0.1:")


async def test_the_envelope_goes_in_one_with_pipelining() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        # The server answers only after all three commands.
        assert await c.mail() == MESSAGE
        assert c.heard[1:4] == [f"MAIL FROM:<{FROM}>".encode(), f"RCPT TO:<{TO}>".encode(), b"DATA"]
        await c.ended()

    assert isinstance(await result_of(script), Sent)


async def test_replies_in_single_bytes_and_many_lines() -> None:
    async def script(c: Conversation) -> None:
        await c.slowly("220-many", "220 lines")
        await c.expect("EHLO ")
        await c.slowly("250-scripted", "250-PIPELINING", "250 SIZE 1000")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.slowly("250-2.1.0 a", "250 2.1.0 b", "250 ok", "354-go", "354 on")
        await c.message()
        await c.slowly("250-2.0.0 queued", "250 2.0.0 as 1")
        await c.ended()

    result = await result_of(script)
    assert isinstance(result, Sent)
    assert result.reply == "250 2.0.0 queued 2.0.0 as 1"


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (b"A: b\r\n\r\n.\r\n..\r\nx.\r\n", b"A: b\r\n\r\n..\r\n...\r\nx.\r\n"),
        (b".\r\n.\r\n", b"..\r\n..\r\n"),
        (b"no end", b"no end\r\n"),
        (b"\r\n.\r\n", b"\r\n..\r\n"),
    ],
)
async def test_dots_are_doubled(message: bytes, sent: bytes) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        assert await c.mail() == sent
        await c.ended()

    assert isinstance(await result_of(script, message), Sent)


async def test_a_large_message_arrives_whole() -> None:
    message = b"Subject: big\r\n\r\n" + b".line of text\r\n" * 400_000

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        assert (await c.mail()).replace(b"\r\n..", b"\r\n.") == message
        await c.ended()

    assert isinstance(await result_of(script, message), Sent)


@pytest.mark.parametrize(
    "wrong",
    [
        (FROM + "\r\nRCPT TO:<x@example.org>", TO, MESSAGE),
        (FROM, TO + "> NOTIFY=NEVER", MESSAGE),
        (FROM, "", MESSAGE),
        (FROM, "a b@example.org", MESSAGE),
        (FROM, TO, b"a\n.\r\nMAIL FROM:<x@example.org>\r\n"),
        (FROM, TO, b"a\r.\r\n"),
        (FROM, TO, b"a\n\rb\r\n"),
    ],
)
async def test_an_address_or_message_that_would_break_out_is_refused(wrong: tuple[str, str, bytes]) -> None:
    pool = SmtpPool(Relay("127.0.0.1", 1, tls=Tls.NONE))
    with pytest.raises(ValueError, match=r"envelope|CRLF"):
        await send(pool, wrong[2], mail_from=wrong[0], rcpt=wrong[1])
    assert pool.state.opened == 0


async def test_the_null_return_path() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        assert b"MAIL FROM:<>" in c.heard
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        assert isinstance(await send(pool, mail_from=""), Sent)


# --- Refusals in the envelope


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("mail", "rcpt", "data", "expected"),
    [
        ("250", "550 5.1.1 who?", "503 no", Rejected(Phase.ENVELOPE, "550 5.1.1 who?", True)),
        ("250", "550 5.1.1 who?", "554 no", Rejected(Phase.ENVELOPE, "550 5.1.1 who?", True)),
        ("250", "451 4.7.1 retry in 60 seconds", "503", Rejected(Phase.ENVELOPE, "451 4.7.1", False, 60.0)),
        ("250", "450 full", "503", Rejected(Phase.ENVELOPE, "450 full", False)),
        ("552 too big", "503", "503", Rejected(Phase.ENVELOPE, "552 too big", True)),
        ("452 later", "503", "503", Rejected(Phase.ENVELOPE, "452 later", False)),
        ("250", "250", "451 not now", Rejected(Phase.DATA, "451 not now", False)),
        ("250", "250", "554 never", Rejected(Phase.DATA, "554 never", True)),
        # RFC 2920 §3.1: DATA accepted though there is no recipient.
        ("250", "550 5.1.1 who?", "354 go on", Rejected(Phase.ENVELOPE, "550 5.1.1 who?", True)),
        ("552 too big", "503", "354 go on", Rejected(Phase.ENVELOPE, "552 too big", True)),
    ],
)
async def test_a_refused_envelope_leaves_the_session_usable(
    mail: str, rcpt: str, data: str, expected: Rejected, pipelining: bool
) -> None:
    async def script(c: Conversation) -> None:
        await c.greet(*(["PIPELINING"] if pipelining else []))
        if pipelining:
            await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
            await c.say(mail, rcpt, data)
            if data.startswith("354"):
                assert await c.line() == b"."
                await c.say("554 no valid recipients")
            if expected.permanent:
                await c.expect("RSET", "MAIL FROM:", "RCPT TO:", "DATA")
                await c.say("250 reset", "250 ok", "250 ok", "354 go on")
            else:
                # RSET comes first: a 4yz means something else if the server closes with it.
                await c.expect("RSET")
                await c.say("250 reset")
                await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
                await c.say("250 ok", "250 ok", "354 go on")
        else:
            for command, reply in (("MAIL", mail), ("RCPT", rcpt), ("DATA", data)):
                await c.expect(command)
                await c.say(reply)
                if not reply.startswith("250"):
                    break
            for command in ("RSET", "MAIL", "RCPT", "DATA"):
                await c.expect(command)
                await c.say("354 go on" if command == "DATA" else "250 ok")
        assert await c.message() == MESSAGE
        await c.say("250 queued")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, Rejected)
        assert result.reply.startswith(expected.reply)
        assert (result.phase, result.permanent, result.retry_after) == (
            expected.phase,
            expected.permanent,
            expected.retry_after,
        )
        assert isinstance(await send(pool), Sent)
        assert server.connections == 1
