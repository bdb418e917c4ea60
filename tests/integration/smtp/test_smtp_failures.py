"""Failures in the middle of a mail, and what is certain after them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from services.sender.replies import InDoubt, LeaseLost, NotSent, Phase, Rejected, SendResult, Sent
from services.sender.smtp_pool import Timeouts
from tests.integration.smtp.script import (
    MESSAGE,
    QUICK,
    Conversation,
    Script,
    Sending,
    pool_for,
    result_of,
    scripted,
    send,
    until,
)

# Larger than the kernel's buffers of both sides, so that its last bytes leave only if the server reads.
HUGE = b"Subject: huge\r\n\r\n" + b"x" * 70 + b"\r\n" + (b"y" * 98 + b"\r\n") * 400_000

# Without the allowance for a message's size: 0.3 s for all of it.
HASTY_BLOCK = Timeouts(connect=20, command=20, data=20, block=0.3 - len(HUGE) / 10_000, after_dot=60)


async def reused(script: Script) -> tuple[SendResult, int]:
    """Return the result of a session's second mail, with ``script`` as its server, and the number of
    connections."""

    async def first(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await script(c)

    async def second(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.ended()

    async with scripted(first, second) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Sent)
        result = await send(pool)
        return result, server.connections


def answering(*replies: str, then: Callable[[Conversation], None] | None = None) -> Script:
    """Answers the pipelined envelope of a fresh session, then closes."""

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say(*replies)
        if then is None:
            await c.ended()
        else:
            then(c)

    return script


# --- Before the message


@pytest.mark.parametrize("end", [Conversation.close, Conversation.reset])
@pytest.mark.parametrize(("replies", "phase"), [([], Phase.ENVELOPE), (["250 ok"], Phase.ENVELOPE)])
async def test_lost_in_the_envelope(
    end: Callable[[Conversation], None], replies: list[str], phase: Phase
) -> None:
    result = await result_of(answering(*replies, then=end))
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (phase, False)


@pytest.mark.parametrize("end", [Conversation.close, Conversation.reset])
async def test_lost_waiting_for_the_354(end: Callable[[Conversation], None]) -> None:
    result = await result_of(answering("250 ok", "250 ok", then=end))
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.DATA, False)


@pytest.mark.parametrize(
    ("replies", "reply", "permanent"),
    [
        (["250 ok", "550 5.1.1 who?"], "550 5.1.1 who?", True),
    ],
)
async def test_a_refusal_counts_though_the_session_is_lost_after_it(
    replies: list[str], reply: str, permanent: bool
) -> None:
    result = await result_of(answering(*replies, then=Conversation.close))
    assert isinstance(result, Rejected)
    assert (result.reply, result.permanent) == (reply, permanent)


@pytest.mark.parametrize(
    ("replies", "phase"),
    [
        (["421 4.3.2 shutting down"], Phase.ENVELOPE),
        (["250 ok", "421 4.3.2 shutting down"], Phase.ENVELOPE),
        (["250 ok", "250 ok", "421 4.3.2 shutting down"], Phase.DATA),
    ],
)
async def test_421_is_transient_and_ends_the_session(replies: list[str], phase: Phase) -> None:
    async with scripted(answering(*replies)) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, Rejected)
        assert (result.phase, result.permanent) == (phase, False)
        assert result.reply == "421 4.3.2 shutting down"
        assert pool.state.idle == 0
        # The pool tried it again on a new session.
        assert server.connections == 2


async def test_a_demand_for_auth_spares_the_attempt() -> None:
    result = await result_of(answering("530 5.7.0 Authentication required", "503 no", "503 no"))
    assert isinstance(result, NotSent)
    assert result.spares_attempt


@pytest.mark.parametrize(
    "replies",
    [
        ["354 go on", "250 ok", "250 ok"],
        ["250 ok", "250 ok", "250 ok"],
        ["220 hello", "334 ", "503"],
        ["hello"],
        ["250 ok", "+OK"],
        ["250 ok", "250 ok", "354 go on", "250 and more"],
    ],
)
async def test_answers_out_of_step_end_the_session(replies: list[str]) -> None:
    async with scripted(answering(*replies)) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert not result.spares_attempt
        assert pool.state.idle == pool.state.busy == 0


@pytest.mark.parametrize(
    ("replies", "phase"),
    [([], Phase.ENVELOPE), (["250 ok"], Phase.ENVELOPE), (["250 ok", "250 ok"], Phase.DATA)],
)
async def test_a_hang_in_the_envelope(replies: list[str], phase: Phase) -> None:
    result = await result_of(answering(*replies), timeouts=replace(QUICK, command=0.3, data=0.3))
    assert isinstance(result, NotSent)
    assert (result.phase, result.cause, result.spares_attempt) == (phase, "timed out", False)


# --- A session that was idle


async def test_an_idle_session_that_the_server_closed_is_not_used() -> None:
    async def close(c: Conversation) -> None:
        c.close()

    result, connections = await reused(close)
    assert isinstance(result, Sent)
    assert connections == 2


async def test_an_idle_session_that_got_421_is_not_used() -> None:
    async def timeout(c: Conversation) -> None:
        await c.say("421 4.4.2 timeout")
        await c.ended()

    result, connections = await reused(timeout)
    assert isinstance(result, Sent)
    assert connections == 2


async def test_421_to_mail_on_a_used_session_is_tried_again_at_once() -> None:
    async def too_many(c: Conversation) -> None:
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("421 4.7.0 too many messages in this session")
        await c.ended()

    result, connections = await reused(too_many)
    assert isinstance(result, Sent)
    assert connections == 2


@pytest.mark.parametrize("end", [Conversation.close, Conversation.reset])
async def test_the_end_at_mail_on_a_used_session_is_tried_again_at_once(
    end: Callable[[Conversation], None],
) -> None:
    async def drop(c: Conversation) -> None:
        await c.expect("MAIL FROM:")
        end(c)

    result, connections = await reused(drop)
    assert isinstance(result, Sent)
    assert connections == 2


async def test_a_refused_reset_drops_the_session() -> None:
    async def first(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("250 ok", "550 who?", "503 no")
        await c.expect("RSET", "MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("500 what?", "503 no", "503 no", "503 no")
        await c.ended()

    async def second(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.ended()

    async with scripted(first, second) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Rejected)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2


async def test_a_refusal_as_out_of_sequence_never_concerns_the_mail() -> None:
    async def nested(c: Conversation) -> None:
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("503 5.5.1 nested MAIL command", "250 ok", "503 no")
        await c.ended()

    result, connections = await reused(nested)
    assert isinstance(result, Sent)
    assert connections == 2

    fresh = await result_of(answering("503 authenticate first", "503 no", "503 no"))
    assert isinstance(fresh, NotSent)
    assert fresh.spares_attempt


async def test_a_loss_after_mail_on_a_used_session_is_not_retried() -> None:
    async def drop(c: Conversation) -> None:
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("250 ok")
        c.close()

    result, connections = await reused(drop)
    assert isinstance(result, NotSent)
    assert connections == 1


# --- The message and after


async def test_a_loss_while_the_message_is_still_buffered_is_not_sent() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        c.reset()

    result = await result_of(script, HUGE)
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.DATA, False)


async def test_no_byte_leaves_once_the_mail_counts_as_not_sent() -> None:
    received = []

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        c.half_close()
        received.append(await c.drained())

    result = await result_of(script, HUGE)
    assert isinstance(result, NotSent)
    assert received[0] < len(HUGE) - 200


async def test_a_server_that_stops_reading_is_not_sent() -> None:
    reading = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await reading.wait()

    async with scripted(script) as server, pool_for(server, timeouts=HASTY_BLOCK) as pool:
        result = await send(pool, HUGE)
        assert isinstance(result, NotSent)
        assert (result.phase, result.cause) == (Phase.DATA, "timed out")
        reading.set()


@pytest.mark.parametrize(
    ("reply", "permanent"),
    [("552 5.3.4 too big", True), ("452 4.3.1 disk full", False), ("421 4.3.2 shutting down", False)],
)
async def test_a_refusal_in_the_middle_of_the_message(reply: str, permanent: bool) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        await c.say(reply)
        await c.drained()

    result = await result_of(script, HUGE)
    assert isinstance(result, Rejected)
    assert (result.phase, result.reply, result.permanent) == (Phase.DATA, reply, permanent)


async def test_a_250_in_the_middle_of_the_message_is_no_acceptance() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        await c.say("250 got it, honestly")
        await c.drained()

    result = await result_of(script, HUGE)
    assert isinstance(result, NotSent)
    assert result.phase is Phase.DATA


@pytest.mark.parametrize("end", [Conversation.close, Conversation.reset])
async def test_lost_after_the_dot_is_in_doubt(end: Callable[[Conversation], None]) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        end(c)

    assert isinstance(await result_of(script), InDoubt)


async def test_a_hang_after_the_dot_is_in_doubt() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.ended()

    result = await result_of(script, timeouts=replace(QUICK, after_dot=0.3))
    assert isinstance(result, InDoubt)
    assert result.cause == "timed out"
    assert result.relay.startswith("127.0.0.1:")


@pytest.mark.parametrize("answer", ["hello", "354 go on", "2500 ok"])
async def test_no_clear_answer_after_the_dot_is_in_doubt(answer: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.say(answer)
        c.close()

    assert isinstance(await result_of(script), InDoubt)


@pytest.mark.parametrize(
    ("answer", "permanent", "retry_after"),
    [
        ("554 5.7.1 spam", True, None),
        ("550 4.2.1 the basic code wins", True, None),
        ("451 4.3.0 try again in 5 minutes", False, 300.0),
        ("421 4.3.2 shutting down", False, None),
    ],
)
async def test_refused_after_the_dot(answer: str, permanent: bool, retry_after: float | None) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.say(answer)
        if not answer.startswith("421"):
            # Some servers keep a transaction open after they refused its message.
            await c.expect("RSET")
            await c.say("250 ok")
            await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
            await c.say("250 ok", "250 ok", "354 go on")
            await c.message()
            await c.say("250 queued")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, Rejected)
        if not answer.startswith("421"):
            assert isinstance(await send(pool), Sent)
    assert result.phase is Phase.AFTER_DOT
    assert (result.reply, result.permanent, result.retry_after) == (answer, permanent, retry_after)


@pytest.mark.parametrize("more", ["421 4.3.2 shutting down", "garbage"])
async def test_a_250_counts_whatever_comes_with_it(more: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        await c.say("250 queued", more)
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, Sent)
        assert result.reply == "250 queued"
        assert pool.state.idle == 0


# --- The lease


async def test_a_lease_lost_before_the_envelope_writes_nothing() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        assert await send(pool, guard=lambda: False) == LeaseLost(Phase.ENVELOPE)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 1


async def test_a_lease_lost_before_the_message_writes_no_byte_of_it() -> None:
    answers = [True, False]

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        assert await send(pool, guard=lambda: answers.pop(0)) == LeaseLost(Phase.DATA)
        assert pool.state.idle == pool.state.busy == 0
    assert server.conversations[0].heard[-1] == b"DATA"


async def test_the_lease_is_checked_again_on_a_second_session() -> None:
    asked: list[int] = []

    async def first(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.expect("MAIL FROM:")
        c.close()

    async def second(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.ended()

    def guard() -> bool:
        asked.append(len(asked))
        return len(asked) < 2

    async with scripted(first, second) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Sent)
        assert await send(pool, guard=guard) == LeaseLost(Phase.ENVELOPE)
        assert server.connections == 2


# --- Withdrawing and cutting off


async def withdrawn(script: Script, ready: asyncio.Event) -> None:
    async with scripted(script) as server, pool_for(server, timeouts=QUICK) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(ready.wait(), 20)
        assert mail.withdraw()
        await until(lambda: pool.state.idle == pool.state.busy == pool.state.opening == 0)
        assert not mail.results
        assert not mail.withdraw()


async def test_withdrawn_while_connecting() -> None:
    ready = asyncio.Event()

    async def script(c: Conversation) -> None:
        ready.set()
        await c.ended()

    await withdrawn(script, ready)


async def test_withdrawn_in_the_envelope() -> None:
    ready = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        ready.set()
        await c.ended()

    await withdrawn(script, ready)


async def test_a_mail_withdrawn_too_late_goes_on_and_its_session_is_reused() -> None:
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

    async with scripted(script) as server, pool_for(server, timeouts=QUICK) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(begun.wait(), 20)
        assert not mail.withdraw()
        assert pool.state.busy == 1
        release.set()
        assert isinstance(await mail.result(), Sent)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 1


async def cut_off(script: Script, ready: asyncio.Event, message: bytes = MESSAGE) -> SendResult:
    async with scripted(script) as server, pool_for(server, timeouts=QUICK) as pool:
        mail = Sending(pool, message)
        await asyncio.wait_for(ready.wait(), 20)
        assert not mail.withdraw()
        result = mail.cut_off()
        assert pool.state.idle == pool.state.busy == 0
        return result


async def test_aborted_while_the_message_is_still_buffered() -> None:
    ready = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        ready.set()
        await c.drained()

    result = await cut_off(script, ready, HUGE)
    assert isinstance(result, NotSent)
    assert result.phase is Phase.DATA


async def test_aborted_after_the_dot_is_in_doubt() -> None:
    ready = asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        ready.set()
        await c.ended()

    assert isinstance(await cut_off(script, ready), InDoubt)
