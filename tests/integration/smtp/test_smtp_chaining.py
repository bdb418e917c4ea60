"""A mail's envelope behind another mail's message (RFC 2920): each end of both, and when it is not done."""

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.sender import smtp_transaction
from services.sender.replies import InDoubt, LeaseLost, NotSent, Phase, Rejected, SendResult, Sent
from services.sender.smtp_pool import Limits, Relay, SmtpPool, Tls
from tests.integration.smtp.script import (
    QUICK,
    Conversation,
    Script,
    ScriptedServer,
    Sending,
    count_chained,
    pool_for,
    scripted,
    send,
    until,
)

CHAINED = ("RSET", "MAIL FROM:", "RCPT TO:", "DATA")
REFUSALS = ["550 5.1.1 no", "451 4.7.1 later", "452 4.4.5 too many messages in this session"]
OK = ("250 ok", "250 ok", "354 go on")


def text(number: int) -> bytes:
    return f"Subject: {number}\r\n\r\n{number}\r\n".encode()


class Server:
    """Counts the messages that it takes."""

    def __init__(self) -> None:
        self.taken: Counter[bytes] = Counter()

    async def take(self, c: Conversation) -> None:
        """Take one message after its 354."""
        self.taken[await c.message()] += 1
        await c.say("250 queued")

    async def serving(self, c: Conversation) -> None:
        """Take mails until the client leaves."""
        await c.greet("PIPELINING")
        await self.go_on(c)

    async def go_on(self, c: Conversation) -> None:
        while (line := await c.line()) and line != b"QUIT":
            if line != b"RSET":
                await c.expect("RCPT TO:", "DATA")
                await c.say(*OK)
                await self.take(c)
            else:
                await c.say("250 reset")
        if line:
            await c.say("221 bye")

    async def chain(self, c: Conversation, *extensions: str) -> bytes:
        """Take the first mail, and read the second one with the third one's envelope behind it."""
        await c.greet("PIPELINING", *extensions)
        await c.envelope()
        await self.take(c)
        await c.envelope()
        message = await c.message()
        # All of it is here before the message has its reply.
        await c.expect(*CHAINED)
        return message


async def played(server: Server, script: Script, *more: Script) -> tuple[list[SendResult], ScriptedServer]:
    """Return the results of three mails; the second and the third one meet the script."""
    async with (
        scripted(script, *(more or [server.serving])) as relay,
        pool_for(relay, timeouts=replace(QUICK, quit=0.3)) as pool,
    ):
        mails = [Sending(pool, text(n)) for n in (1, 2, 3)]
        results = [await mail.result() for mail in mails]
    assert isinstance(results[0], Sent)
    return results[1:], relay


@pytest.mark.parametrize("first", ["250 queued", "554 5.7.1 spam", "451 4.7.1 greylisted"])
async def test_a_chained_mail_is_sent_whatever_the_reply_to_the_message_before(first: str) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say(first, "250 reset", *OK)
        await server.take(c)
        await c.ended()

    (second, third), relay = await played(server, script)
    assert isinstance(second, Sent if first.startswith("250") else Rejected)
    if isinstance(second, Rejected):
        assert (second.reply, second.phase, second.about_session) == (first, Phase.AFTER_DOT, False)
    assert isinstance(third, Sent)
    assert server.taken[text(3)] == 1
    assert relay.connections == 1


@pytest.mark.parametrize("end", [Conversation.close, Conversation.reset])
@pytest.mark.parametrize(
    ("replies", "expected"),
    [((), InDoubt), (("250 queued",), Sent), (("250 queued", "250 reset"), Sent), (("554 no",), Rejected)],
)
async def test_a_session_lost_before_the_reply_to_mail_costs_the_chained_mail_nothing(
    replies: tuple[str, ...], expected: type, end: Callable[[Conversation], None]
) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say(*replies)
        if replies:
            # A reset would drop what the client has not read.
            await asyncio.sleep(0.1)
        end(c)

    (second, third), relay = await played(server, script)
    assert isinstance(second, expected)
    assert isinstance(third, Sent)
    assert server.taken == {text(1): 1, text(3): 1}
    assert relay.connections == 2


@pytest.mark.parametrize("more", [(), ("250 reset",), ("250 reset", "250 ok"), ("250 reset", *OK)])
@pytest.mark.parametrize(
    ("reply", "expected"), [("354 go on", InDoubt), ("452 4.4.5 too many messages in this session", Sent)]
)
async def test_a_reply_that_ends_the_session_costs_the_chained_mail_nothing(
    reply: str, expected: type, more: tuple[str, ...]
) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        # All in one write, so that the client has replies to the envelope when it ends the session.
        await c.say(reply, *more)
        assert await c.drained() == 0

    (second, third), relay = await played(server, script)
    assert isinstance(second, expected)
    assert isinstance(third, Sent)
    assert server.taken == {text(1): 1, text(3): 1} | ({text(2): 1} if expected is Sent else {})
    assert relay.connections in (2, 3)


@pytest.mark.parametrize("reply", ["421 4.3.2 shutting down", "451 4.7.1 that is enough"])
async def test_a_session_that_ends_with_a_refusal_costs_neither_mail_anything(reply: str) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say(reply)

    (second, third), relay = await played(server, script)
    assert isinstance(second, Sent)
    assert isinstance(third, Sent)
    assert server.taken == {text(1): 1, text(2): 1, text(3): 1}
    assert relay.connections in (2, 3)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("250 ok",), NotSent(Phase.ENVELOPE, "connection closed by the server", False)),
        (("250 ok", "250 ok"), NotSent(Phase.DATA, "connection closed by the server", False)),
        (("452 4.3.1 full",), Rejected(Phase.ENVELOPE, "452 4.3.1 full", False, None, "", True)),
        (("250 ok", "550 5.1.1 who?"), Rejected(Phase.ENVELOPE, "550 5.1.1 who?", True)),
        (("250 ok", "hello"), NotSent(Phase.ENVELOPE, "not a reply: 'hello'", False, "", "hello")),
    ],
)
async def test_a_session_lost_after_the_reply_to_mail_ends_the_chained_mail_as_any_other(
    replies: tuple[str, ...], expected: NotSent | Rejected
) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say("250 queued", "250 reset", *replies)

    (second, third), _ = await played(server, script)
    assert isinstance(second, Sent)
    if isinstance(expected, Rejected) and expected.about_session:
        assert isinstance(third, Sent)
        assert server.taken[text(3)] == 1
        return
    assert isinstance(third, NotSent | Rejected)
    assert replace(third, relay="", step=None) == expected
    assert server.taken[text(3)] == 0


@pytest.mark.parametrize(
    ("replies", "phase"),
    [
        (("452 4.3.1 full", "503 no", "503 no"), Phase.ENVELOPE),
        (("250 ok", "550 5.1.1 who?", "503 no"), Phase.ENVELOPE),
        (("250 ok", "550 5.1.1 who?", "354 go on"), Phase.ENVELOPE),
        (("250 ok", "250 ok", "451 later"), Phase.DATA),
    ],
)
async def test_a_refused_chained_envelope_leaves_the_session_usable(
    replies: tuple[str, ...], phase: Phase
) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say("250 queued", "250 reset", *replies)
        if replies[2].startswith("354"):
            assert await c.line() == b"."
            await c.say("554 no valid recipients")
        await server.go_on(c)

    async with scripted(script) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(n)) for n in (1, 2, 3)]
        results = [await mail.result() for mail in mails]
        assert [type(result) for result in results] == [Sent, Sent, Rejected]
        assert isinstance(results[2], Rejected)
        assert results[2].phase is phase
        assert isinstance(await send(pool), Sent)
        assert relay.connections == 1


@pytest.mark.parametrize("first", ["250 queued", "554 5.7.1 spam"])
async def test_a_server_that_kept_a_transaction_open_gets_neither_a_message_nor_a_dot(first: str) -> None:
    """It would take the next recipient into the transaction before."""
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say(first, "250 reset", "503 5.5.1 nested MAIL command", "250 ok", "354 go on")
        assert await c.drained() == 0

    (second, third), relay = await played(server, script)
    assert isinstance(second, Sent if first.startswith("250") else Rejected)
    assert isinstance(third, Sent)
    assert server.taken[text(3)] == 1
    assert relay.connections == 2


@pytest.mark.parametrize(
    "replies", [["250 queued", "500 what?", "503 no", "503 no", "503 no"], ["250 queued"]]
)
async def test_a_server_that_takes_no_commands_behind_a_message_gets_none_anymore(replies: list[str]) -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say(*replies)
        assert await c.drained() == 0

    (second, third), relay = await played(server, script)
    assert isinstance(second, Sent)
    assert isinstance(third, Sent)
    assert server.taken[text(3)] == 1
    assert relay.connections == 2

    async with (
        scripted(script, server.serving) as relay,
        pool_for(relay, timeouts=replace(QUICK, quit=0.3)) as pool,
    ):
        results = [await mail.result() for mail in [Sending(pool, text(n)) for n in range(1, 20)]]
        assert {type(result) for result in results} == {Sent}
        assert b"RSET" not in relay.conversations[1].heard


async def test_the_lease_of_a_chained_mail_is_checked_before_its_envelope_and_before_its_message() -> None:
    server = Server()
    answers = {2: [True, True], 3: [True, False]}

    async def script(c: Conversation) -> None:
        await server.chain(c)
        await c.say("250 queued", "250 reset", *OK)
        assert await c.drained() == 0

    async with scripted(script) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(1))]
        mails += [Sending(pool, text(n), (lambda n=n: answers[n].pop(0))) for n in (2, 3)]
        results = [await mail.result() for mail in mails]
        assert [type(result) for result in results] == [Sent, Sent, LeaseLost]
        assert results[2] == LeaseLost(Phase.DATA)
    assert server.taken[text(3)] == 0


async def test_a_mail_whose_lease_is_lost_is_not_chained() -> None:
    server = Server()
    async with scripted(server.serving) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(n), (lambda n=n: n != 3)) for n in (1, 2, 3, 4)]
        results = [await mail.result() for mail in mails]
        assert results[2] == LeaseLost(Phase.ENVELOPE)
        assert relay.connections == 1
    assert set(server.taken) == {text(1), text(2), text(4)}


# --- Withdrawing and cutting off


async def test_a_chained_mail_can_be_withdrawn_and_the_mail_before_still_gets_its_reply() -> None:
    server = Server()
    chained, release = asyncio.Event(), asyncio.Event()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        chained.set()
        await release.wait()
        await c.say("250 queued")
        assert await c.drained() == 0

    async with scripted(script, server.serving) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(n)) for n in (1, 2, 3, 4)]
        await asyncio.wait_for(chained.wait(), 20)
        assert mails[2].withdraw()
        assert not mails[1].withdraw()
        release.set()
        assert isinstance(await mails[1].result(), Sent)
        assert isinstance(await mails[3].result(), Sent)
        assert not mails[2].results
        assert relay.connections == 2
    assert server.taken[text(3)] == 0


async def test_cutting_off_a_mail_costs_the_chained_one_nothing() -> None:
    server = Server()
    chained = asyncio.Event()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        chained.set()
        await c.drained()

    async with scripted(script, server.serving) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(n)) for n in (1, 2, 3)]
        await asyncio.wait_for(chained.wait(), 20)
        pool.cut_off(mails[2].mail)
        assert not mails[2].results, "its message was not written"
        assert isinstance(mails[1].cut_off(), InDoubt)
        assert isinstance(await mails[2].result(), Sent)
    assert server.taken == {text(1): 1, text(3): 1}


async def test_a_pool_that_closes_ends_both() -> None:
    server = Server()
    chained = asyncio.Event()

    async def script(c: Conversation) -> None:
        await server.chain(c)
        chained.set()
        await c.drained()

    async with scripted(script) as relay, pool_for(relay) as pool:
        mails = [Sending(pool, text(n)) for n in (1, 2, 3)]
        await asyncio.wait_for(chained.wait(), 20)
        await pool.close(grace=0.05)
        assert isinstance(await mails[1].result(), InDoubt)
        third = await mails[2].result()
        assert isinstance(third, NotSent)
        assert third.spares_attempt


# --- A reply that is slow


async def test_a_chained_mail_does_not_wait_for_a_slow_reply_while_another_session_is_free() -> None:
    server = Server()
    chained, release = asyncio.Event(), asyncio.Event()

    async def slow(c: Conversation) -> None:
        server.taken[await server.chain(c)] += 1
        chained.set()
        await release.wait()
        await c.say("250 queued")
        assert await c.drained() == 0, "the envelope's mail went on another session"

    async def busy(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await chained.wait()
        await server.take(c)
        await server.go_on(c)

    async with scripted(slow, busy) as relay, pool_for(relay, limits=Limits(sessions=2)) as pool:
        others = [Sending(pool, text(n)) for n in (8, 9)]
        await until(lambda: any(mail.results for mail in others) and pool.state.opening == 0)
        second, third = Sending(pool, text(2)), Sending(pool, text(3))
        await asyncio.wait_for(chained.wait(), 20)
        begun = asyncio.get_running_loop().time()
        assert isinstance(await third.result(), Sent)
        assert asyncio.get_running_loop().time() - begun < 5
        assert not second.results
        release.set()
        assert isinstance(await second.result(), Sent)
        assert {type(await mail.result()) for mail in others} == {Sent}
    assert server.taken == {text(n): 1 for n in (2, 3, 8, 9)}


async def test_a_chained_mail_stays_where_no_other_session_moves() -> None:
    server = Server()

    async def script(c: Conversation) -> None:
        server.taken[await server.chain(c)] += 1
        await asyncio.sleep(1.2)
        await c.say("250 queued", "250 reset", *OK)
        await server.take(c)
        await c.ended()

    (second, third), relay = await played(server, script)
    assert isinstance(second, Sent)
    assert isinstance(third, Sent)
    assert relay.connections == 1


async def chained_mails(pool: SmtpPool, relay: ScriptedServer, message: bytes = b"A: b\r\n\r\nc\r\n") -> int:
    """Return how many of ten mails are chained."""
    mails = [Sending(pool, message) for _ in range(10)]
    assert {type(await mail.result()) for mail in mails} == {Sent}
    return sum(c.heard.count(b"RSET") for c in relay.conversations)


async def test_mails_are_chained_only_where_all_sessions_are_busy_and_small_and_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server()

    async def slow(c: Conversation) -> None:
        await c.greet("PIPELINING")
        while (line := await c.line()) and line != b"QUIT":
            await c.expect("RCPT TO:", "DATA")
            await c.say(*OK)
            await c.message()
            await asyncio.sleep(0.12)
            await c.say("250 queued")

    async def one_by_one(c: Conversation) -> None:
        await c.greet()
        while (line := await c.line()) and line != b"QUIT":
            for verb in ("RCPT TO:", "DATA"):
                await c.say("250 ok")
                await c.expect(verb)
            await c.say("354 go on")
            await server.take(c)

    one = Limits(sessions=1)
    async with scripted(server.serving) as relay, pool_for(relay, limits=one) as pool:
        # Not behind the first mail, whose session is not known yet, and not behind the last one.
        assert await chained_mails(pool, relay) == 8
    async with scripted(server.serving) as relay, pool_for(relay, limits=one) as pool:
        assert await chained_mails(pool, relay, b"A: b\r\n\r\n" + b"x" * 70_000 + b"\r\n") == 0
    async with scripted(server.serving) as relay, pool_for(relay, limits=Limits(sessions=10)) as pool:
        assert await chained_mails(pool, relay) == 0
    async with scripted(one_by_one) as relay, pool_for(relay, limits=one) as pool:
        assert await chained_mails(pool, relay) == 0
    monkeypatch.setattr(smtp_transaction, "_PROMPT", 0.1)
    async with scripted(slow) as relay, pool_for(relay, limits=one) as pool:
        assert await chained_mails(pool, relay) == 0


async def test_a_chained_mail_counts_for_its_session() -> None:
    server = Server()
    limits = Limits(sessions=1, mails_per_session=4)
    async with scripted(server.serving) as relay, pool_for(relay, limits=limits) as pool:
        mails = [Sending(pool, text(n)) for n in range(10)]
        assert {type(await mail.result()) for mail in mails} == {Sent}
        for c in relay.conversations:
            assert sum(line.startswith(b"MAIL") for line in c.heard) <= 4
        assert relay.connections == 3


# --- A real server

ENDS = {
    "ok": (Sent, 1),
    "reject5": (Rejected, 0),
    "data5": (Rejected, 0),
    "greylist-always": (Rejected, 0),
    "drop-before-always": (NotSent, 0),
    "drop-after-always": (InDoubt, 1),
    "drop-lost-always": (InDoubt, 0),
}


async def test_the_catcher_takes_chained_mails_once_each(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.local.catcher", "--mail-dir", str(tmp_path / "mail")),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        port = int((await process.stdout.readline()).rpartition(b":")[2])
        pool = SmtpPool(Relay("127.0.0.1", port, tls=Tls.NONE), limits=Limits(sessions=2))
        chained = count_chained(pool)
        dice = random.Random(3)
        names = dice.choices(list(ENDS), [60, 2, 2, 2, 2, 2, 2], k=300)
        mails = []
        for number, name in enumerate(names):
            message = f"Message-ID: <{number}@x.test>\r\n\r\n{number}\r\n".encode()
            mails.append(Sending(pool, message, rcpt=f"{name}@x.test"))
        results = [await mail.result() for mail in mails]
        await pool.close()
        copies = Counter(
            json.loads(line)["message_id"] for line in (tmp_path / "mail" / "journal.jsonl").open()
        )
        found = [(type(result), copies[f"<{n}@x.test>"]) for n, result in enumerate(results)]
        assert found == [ENDS[name] for name in names]
        assert len(chained) > 100
    finally:
        process.terminate()
        await process.wait()


# --- All of it


class Whims:
    """A server that takes, refuses or leaves, as its dice say; it knows what it took."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.taken: Counter[bytes] = Counter()

    async def __call__(self, c: Conversation) -> None:
        with contextlib.suppress(ConnectionError):
            await self._serve(c)

    async def _serve(self, c: Conversation) -> None:
        await c.greet("PIPELINING")
        refused = False
        while (line := await c.line()) and line != b"QUIT":
            verb = line[:4]
            whim = self.dice.random()
            if whim < 0.005:
                c.reset()
                return
            if whim < 0.01:
                await c.say("421 4.3.2 leaving")
                return
            if verb == b"RSET":
                refused = False
                await c.say("250 reset")
                continue
            if verb == b"MAIL":
                refused = False
            if refused or whim < 0.04:
                refused = True
                await c.say(
                    self.dice.choice(
                        ["550 5.1.1 no", "451 4.7.1 later", "452 4.4.5 too many in this session"]
                    )
                )
            elif verb != b"DATA":
                await c.say("250 ok")
            else:
                await c.say("354 go on")
                if not await self._message(c):
                    return
        if line:
            await c.say("221 bye")

    async def _message(self, c: Conversation) -> bool:
        """Take a message or not; return whether the session goes on."""
        message = await c.message(or_end=True)
        if not message:
            return False
        whim = self.dice.random()
        if whim < 0.03:
            await c.say("554 5.7.1 spam")
            return True
        if whim < 0.04:
            await c.say("451 4.3.0 not now")
            return False
        if whim < 0.05:
            return False
        self.taken[message] += 1
        if whim < 0.06:
            return False
        if whim < 0.07:
            await asyncio.sleep(0.3)
        await c.say("250 queued")
        return True


@pytest.mark.parametrize("seed", [1, 2])
async def test_each_result_of_a_thousand_mails_agrees_with_what_the_server_took(seed: int) -> None:
    server = Whims(seed)
    dice = random.Random(seed)
    async with (
        scripted(server) as relay,
        pool_for(relay, limits=Limits(sessions=4, backoff=0.01, backoff_max=0.02)) as pool,
    ):
        mails: dict[int, Sending] = {}
        withdrawn: set[int] = set()
        for number in range(1000):
            if not pool.available:
                await pool.wait_available()
            mails[number] = Sending(pool, text(number), lambda: dice.random() > 0.01)
            if dice.random() < 0.03:
                other = dice.choice(list(mails))
                if mails[other].withdraw():
                    withdrawn.add(other)
                elif dice.random() < 0.5:
                    pool.cut_off(mails[other].mail)
            if number % 12 == 0:
                await until(lambda: sum(not mail.results for mail in mails.values()) - len(withdrawn) < 6)
        results = {n: await mail.result() for n, mail in mails.items() if n not in withdrawn}
        chained = sum(c.heard.count(b"RSET") for c in relay.conversations)
    for number in withdrawn:
        assert (server.taken[text(number)], mails[number].results) == (0, [])
    for number, result in results.items():
        copies = server.taken[text(number)]
        if isinstance(result, Sent):
            assert copies == 1
        elif isinstance(result, InDoubt):
            assert copies <= 1
        else:
            assert copies == 0, result
    kinds = Counter(type(result) for result in results.values())
    assert {Sent, Rejected, NotSent, InDoubt, LeaseLost} <= set(kinds), kinds
    assert kinds[Sent] > 500
    assert chained > 0
