"""Refusals of the session and of the account: the mail goes on a new session, or all mails wait."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from services.sender.replies import LeaseLost, NotSent, Phase, Rejected, SendResult, Sent
from services.sender.smtp_pool import Limits, SmtpPool
from tests.integration.smtp.script import (
    FROM,
    MESSAGE,
    QUICK,
    Conversation,
    Script,
    Sending,
    pool_for,
    scripted,
    send,
    until,
)

Answer = Callable[[int], str | None]


async def serve(
    c: Conversation, answers: dict[str, Answer], *, pipelining: bool = True, size: int = 10_000_000
) -> None:
    """Take mails until the client leaves.

    `answers` has, by command ("MAIL", "RCPT", "DATA", "."), what refuses the n-th mail of the session; None
    takes it. A refusal that begins with "!" is followed by the end of the connection.
    """
    await c.greet(f"SIZE {size}", *(["PIPELINING"] if pipelining else []))
    mails = 0
    refused = False
    while (line := await c.line()) and line != b"QUIT":
        command = line[:4].decode()
        if command == "RSET":
            refused = False
            await c.say("250 reset")
            continue
        if command == "MAIL":
            mails += 1
            refused = False
        answer = None if refused else answers.get(command, lambda n: None)(mails)
        if refused:
            answer = "503 5.5.1 no"
        if answer is not None:
            refused = True
            await c.say(*answer.removeprefix("!").split("\n"))
            if answer.startswith("!"):
                return
        elif command == "DATA":
            await c.say("354 go on")
            if not await c.message(or_end=True):
                return
            end = answers.get(".", lambda n: None)(mails)
            await c.say(end.removeprefix("!") if end else "250 queued")
            if end and end.startswith("!"):
                return
        else:
            await c.say("250 ok")
    if line:
        await c.say("221 bye")


def from_the(n: int, answer: str) -> Answer:
    return lambda mails: answer if mails >= n else None


def playing(**answers: Answer) -> Script:
    async def script(c: Conversation) -> None:
        await serve(c, {("." if name == "message" else name): answer for name, answer in answers.items()})

    return script


async def until_taken(pool: SmtpPool) -> SendResult:
    """Send a mail as the stage does: wait for the relay, and retry while the refusal concerns the account."""
    while True:
        await pool.wait_available()
        result = await send(pool)
        if not (isinstance(result, NotSent) and result.spares_attempt):
            return result


# --- Of the session


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "message"])
@pytest.mark.parametrize(
    "reply",
    [
        "452 4.4.5 Maximum number of messages per session exceeded",
        "451-Requested action aborted\n451 Mails per session limit exceeded",
    ],
)
async def test_a_relay_that_takes_few_mails_a_session_gets_each_at_once(command: str, reply: str) -> None:
    if command == "message":
        reply = reply.partition("\n")[2] or reply
    async with (
        scripted(playing(**{command: from_the(6, reply)})) as server,
        pool_for(server, limits=Limits(sessions=4)) as pool,
    ):
        results = await asyncio.wait_for(asyncio.gather(*(send(pool) for _ in range(100))), 30)
        assert {type(result) for result in results} == {Sent}
        assert pool.available
        # A session that has refused a mail gets no other one. Only an envelope may be there already, which
        # came behind the message.
        for c in server.conversations:
            assert sum(line.startswith(b"MAIL") for line in c.heard) <= 6 + (command == "message")
            assert c.messages <= 6


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize(
    "reply",
    [
        "!451 4.4.2 Timeout waiting for data from client.",
        "!421 4.7.0 Too many messages",
        "!450 4.7.1 that is enough",
        "450 4.4.2 bad connection",
    ],
)
async def test_a_refusal_that_ends_the_session_is_no_attempt(
    command: str, reply: str, pipelining: bool
) -> None:
    async def first(c: Conversation) -> None:
        await serve(c, {command: from_the(2, reply)}, pipelining=pipelining)

    async with scripted(first, playing()) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Sent)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2


async def test_the_mail_goes_on_one_new_session_only_and_then_counts() -> None:
    script = playing(RCPT=lambda n: "!421 4.7.0 try again in 5 minutes")
    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, Rejected)
        assert (result.permanent, result.retry_after) == (False, 300)
        assert result.reply == "421 4.7.0 try again in 5 minutes"
        assert server.connections == 2
        assert pool.available
        assert pool.state.idle == pool.state.busy == 0


async def test_a_4yz_that_leaves_the_session_open_is_the_mails() -> None:
    script = playing(RCPT=lambda n: "451 4.7.1 greylisted" if n == 1 else None)
    async with scripted(script) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Rejected)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 1


async def test_a_server_that_neither_answers_nor_closes_has_not_closed() -> None:
    async def mute(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await c.say("250 ok", "451 4.7.1 greylisted", "503 no")
        await c.expect("RSET")
        await c.drained()

    async with scripted(mute, playing()) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), Rejected)
        assert server.connections == 1


async def test_the_lease_is_checked_again_before_the_mail_goes_on_a_new_session() -> None:
    left = [True, False]
    script = playing(RCPT=lambda n: "!421 no")
    async with scripted(script) as server, pool_for(server) as pool:
        assert await send(pool, guard=lambda: left.pop(0)) == LeaseLost(Phase.ENVELOPE)
        assert server.connections == 2


async def test_a_new_session_that_does_not_open_costs_no_attempt() -> None:
    async def full(c: Conversation) -> None:
        await c.say("421 4.7.0 too many connections")
        await c.drained()

    async with scripted(playing(MAIL=lambda n: "!421 bye"), full) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert result.spares_attempt
        assert server.connections >= 2


async def test_a_mail_withdrawn_too_late_and_refused_after_the_dot_is_not_sent_again() -> None:
    ready, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        ready.set()
        await release.wait()
        await c.say("451 4.4.2 timeout")
        await c.ended()

    async with scripted(script) as server, pool_for(server) as pool:
        mail = Sending(pool)
        await asyncio.wait_for(ready.wait(), 20)
        assert not mail.withdraw()
        release.set()
        result = await mail.result()
        assert isinstance(result, Rejected)
        assert not result.permanent
        assert server.connections == 1


async def test_a_new_session_is_within_the_limit_though_others_are_busy_or_idle() -> None:
    now = most = 0

    async def counting(c: Conversation) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await serve(c, {"MAIL": from_the(3, "452 4.4.5 enough")})
        now -= 1

    async with scripted(counting) as server, pool_for(server, limits=Limits(sessions=3)) as pool:
        results = await asyncio.wait_for(asyncio.gather(*(send(pool) for _ in range(60))), 20)
        assert {type(result) for result in results} == {Sent}
    assert most <= 3


# --- Of the account


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("MAIL", "550 5.4.5 Daily user sending quota exceeded"),
        ("message", "554 5.7.0 Daily limit of messages exceeded. Try again later."),
        ("MAIL", f"553 5.7.1 <{FROM}>: Sender address rejected: not owned by auth user"),
        ("RCPT", f"553 5.7.1 <{FROM}>: Sender address rejected: not owned by auth user"),
        ("MAIL", "550 5.7.1 whatever"),
    ],
)
async def test_all_mails_wait_after_a_refusal_of_the_account(command: str, reply: str) -> None:
    taken = 0
    refusing = False
    changes: list[str | None] = []

    def answer(mails: int) -> str | None:
        nonlocal taken
        if refusing:
            return reply
        return None

    limits = Limits(sessions=4, backoff=0.01, backoff_max=0.05)
    async with scripted(playing(**{command: answer})) as server, pool_for(server, limits=limits) as pool:
        pool._availability._on_trouble = lambda trouble: changes.append(trouble and trouble.cause)
        results = [await send(pool) for _ in range(10)]
        refusing = True
        waiting = [asyncio.create_task(until_taken(pool)) for _ in range(40)]
        await until(lambda: not pool.available and sum(changes == [] or t == reply for t in changes) >= 5)
        assert pool.state.trouble is not None
        assert (pool.state.trouble.cause, pool.state.trouble.spares_attempt) == (reply, True)
        assert not any(task.done() for task in waiting)
        refusing = False
        results += await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert {type(result) for result in results} == {Sent}
        assert pool.state.trouble is None
        assert changes[-1] is None


async def test_only_one_mail_at_a_time_is_tried_while_the_account_is_refused() -> None:
    refused = woken = 0
    refusing = True

    def answer(mails: int) -> str | None:
        nonlocal refused
        refused += refusing
        return "550 5.4.5 quota" if refusing else None

    limits = Limits(sessions=4, backoff=0.01, backoff_max=0.02)
    async with scripted(playing(MAIL=answer)) as server, pool_for(server, limits=limits) as pool:
        wake = pool._availability._wake

        def counted(count: int) -> int:
            nonlocal woken
            went = wake(count)
            woken += went
            return went

        pool._availability._wake = counted  # type: ignore[method-assign]
        waiting = [asyncio.create_task(until_taken(pool)) for _ in range(40)]
        await until(lambda: woken >= 5)
        # The mails under way when it began, one a session, and each later probe.
        assert refused <= limits.sessions + woken
        refusing = False
        results = await asyncio.wait_for(asyncio.gather(*waiting), 20)
        assert {type(result) for result in results} == {Sent}


async def test_a_mail_that_arrives_while_none_waits_is_the_next_probe() -> None:
    script = playing(MAIL=lambda n: "550 5.4.5 quota" if n == 1 else None)
    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        await until(lambda: pool._availability._probe_pending)
        assert not pool.available
        assert isinstance(await asyncio.wait_for(until_taken(pool), 20), Sent)
        assert pool.available


async def test_a_refusal_of_the_probe_itself_shows_that_the_account_is_accepted() -> None:
    script = playing(
        MAIL=lambda n: "550 5.4.5 quota" if n == 1 else None,
        RCPT=lambda n: "550 5.1.1 who?" if n == 2 else None,
    )
    async with scripted(script) as server, pool_for(server) as pool:
        assert isinstance(await send(pool), NotSent)
        assert isinstance(await until_taken(pool), Rejected)
        assert pool.available


async def test_a_probe_that_never_reached_the_relay_shows_nothing() -> None:
    refusing = True

    async def script(c: Conversation) -> None:
        await serve(c, {"MAIL": lambda n: "550 5.4.5 quota" if refusing else None}, size=1000)

    changes: list[str | None] = []
    async with scripted(script) as server, pool_for(server) as pool:
        pool._availability._on_trouble = lambda trouble: changes.append(trouble and trouble.cause)
        assert isinstance(await send(pool), NotSent)
        await pool.wait_available()
        assert isinstance(await send(pool, MESSAGE * 100), Rejected)
        assert not pool.available
        assert None not in changes
        refusing = False
        assert isinstance(await asyncio.wait_for(until_taken(pool), 20), Sent)
        assert pool.available


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("refused", "probe", "up"),
    [
        ("RCPT", "MAIL", False),
        ("DATA", "RCPT", False),
        (".", "MAIL", False),
        (".", "RCPT", False),
        (".", "DATA", False),
        ("MAIL", "MAIL", True),
        ("MAIL", "RCPT", True),
        ("RCPT", "DATA", True),
        (".", ".", True),
    ],
)
async def test_only_a_refusal_at_the_same_or_a_later_step_ends_the_trouble(
    refused: str, probe: str, up: bool, pipelining: bool
) -> None:
    mails = 0

    def answer(command: str) -> Answer:
        def one(n: int) -> str | None:
            if mails == 1 and command == refused:
                return "550 5.4.5 Daily user sending quota exceeded"
            return "552 5.3.4 too big" if mails == 2 and command == probe else None

        return one

    async def script(c: Conversation) -> None:
        await serve(c, {name: answer(name) for name in ("MAIL", "RCPT", "DATA", ".")}, pipelining=pipelining)

    async with scripted(script) as server, pool_for(server) as pool:
        mails = 1
        assert isinstance(await send(pool), NotSent)
        await pool.wait_available()
        mails = 2
        assert isinstance(await send(pool), Rejected)
        assert pool.available is up
        mails = 3
        assert isinstance(await asyncio.wait_for(until_taken(pool), 20), Sent)


# --- A relay that answers MAIL of no mail


async def close(c: Conversation) -> None:
    c.close()


async def keep_silent(c: Conversation) -> None:
    await c.drained()


async def talk_nonsense(c: Conversation) -> None:
    await c.say("what?")


@pytest.mark.parametrize("end", [close, keep_silent, talk_nonsense])
async def test_a_relay_that_answers_no_mail_command_soon_counts_as_down(
    end: Callable[[Conversation], Awaitable[None]],
) -> None:
    well = False

    async def script(c: Conversation) -> None:
        if well:
            await serve(c, {})
            return
        await c.greet()
        if await c.line():
            await end(c)

    timeouts = replace(QUICK, command=0.1)
    async with scripted(script) as server, pool_for(server, timeouts=timeouts) as pool:
        results = [await send(pool) for _ in range(3)]
        assert [result.spares_attempt for result in results if isinstance(result, NotSent)] == [
            False,
            False,
            True,
        ]
        assert not pool.available
        await pool.wait_available()
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert result.spares_attempt
        assert result.phase is Phase.ENVELOPE
        well = True
        assert isinstance(await asyncio.wait_for(until_taken(pool), 20), Sent)
        assert pool.available


@pytest.mark.parametrize("reply", ["250 ok", "452 4.3.1 disk full"])
async def test_a_reply_to_another_mail_shows_that_the_relay_works(reply: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet()
        await c.expect("MAIL FROM:")
        if len(server.conversations) % 3 == 0:
            await c.say(reply)
            await c.line()

    async with scripted(script) as server, pool_for(server) as pool:
        for _ in range(9):
            result = await send(pool)
            assert not (isinstance(result, NotSent) and result.spares_attempt)
        assert pool.available


async def test_silence_after_a_whole_envelope_may_concern_the_recipient() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.drained()

    timeouts = replace(QUICK, command=0.05)
    async with scripted(script) as server, pool_for(server, timeouts=timeouts) as pool:
        for _ in range(5):
            result = await send(pool)
            assert isinstance(result, NotSent)
            assert not result.spares_attempt


async def test_a_refused_message_size_concerns_the_mail() -> None:
    script = playing(MAIL=lambda n: "552 5.3.4 message too big")
    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool, MESSAGE * 10)
        assert isinstance(result, Rejected)
        assert result.permanent
        assert pool.available
