"""The sender's handler with the real client: a refusal of the session or the account costs no attempt."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.stage.types import Done, Outcome
from services.sender.smtp_pool import Limits
from tests.integration.smtp.script import Conversation, pool_for, scripted, until
from tests.unit.test_sender_stage import World, handle, mx_ok

QUOTA = "550 5.4.5 Daily user sending quota exceeded"
QUOTA_AFTER_DOT = "554 5.7.0 Daily limit of messages exceeded. Try again later."
NOT_OWNED = "553 5.7.1 Sender address rejected: not owned by auth user"


class MailServer:
    """Accepts mails and counts their copies. `refuse` may return a refusal of a session's command."""

    def __init__(self, refuse: Callable[[str, int], str | None] = lambda command, mails: None) -> None:
        self.refuse = refuse
        self.copies: Counter[str] = Counter()

    async def __call__(self, c: Conversation) -> None:
        await c.greet()
        mails = 0
        while (line := await c.line()) and line != b"QUIT":
            command = line[:4].decode()
            mails += command == "MAIL"
            refusal = self.refuse(command, mails)
            if refusal is not None:
                await c.say(refusal.removeprefix("!"))
                if refusal.startswith("!"):
                    return
            elif command == "DATA":
                await c.say("354 go on")
                message = await c.message()
                refusal = self.refuse(".", mails)
                if refusal is None:
                    [id_] = [line for line in message.decode().splitlines() if line.startswith("Message-ID:")]
                    self.copies[id_] += 1
                await c.raw((refusal or "250 2.0.0 queued").encode() + b"\n")
            else:
                await c.say("250 ok")
        if line:
            await c.say("221 bye")


def task_ids(count: int) -> list[bytes]:
    return [n.to_bytes(16, "big") for n in range(1, count + 1)]


def assert_sent_at_the_first_attempt(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert isinstance(outcome, Done)
        [event] = outcome.events
        assert isinstance(event, pb.MailSent)
        assert event.attempt == 1


@pytest.mark.parametrize(
    ("command", "reply"), [("MAIL", QUOTA), (".", QUOTA_AFTER_DOT), ("MAIL", NOT_OWNED), ("RCPT", NOT_OWNED)]
)
async def test_the_queue_waits_while_the_account_may_not_send(command: str, reply: str) -> None:
    refusing = asyncio.Event()
    refusing.set()

    def refuse(asked: str, mails: int) -> str | None:
        full = sum(server.copies.values()) >= 10 and refusing.is_set()
        return reply if full and asked == command else None

    server = MailServer(refuse)
    limits = Limits(sessions=4, backoff=0.01, backoff_max=0.05)
    async with scripted(server) as relay, pool_for(relay, limits=limits) as pool:
        world = World(pool)  # type: ignore[arg-type]
        handling = [asyncio.create_task(handle(world.sender, mx_ok(id=id_))) for id_ in task_ids(50)]
        await until(lambda: pool.state.trouble is not None and pool.state.trouble.cause == reply)
        # Repeated probes do not count as attempts.
        failures = pool._availability._failures
        await until(lambda: pool._availability._failures >= failures + 3)
        assert sum(server.copies.values()) <= 13
        await until(lambda: sum(task.done() for task in handling) == sum(server.copies.values()))
        refusing.clear()
        assert_sent_at_the_first_attempt(await asyncio.wait_for(asyncio.gather(*handling), 30))
        assert set(server.copies.values()) == {1}
        assert len(server.copies) == 50
        await world.shared.close()


@pytest.mark.parametrize("command", ["MAIL", "DATA"])
async def test_a_relay_that_takes_five_mails_a_session_gets_a_hundred_without_a_deferral(
    command: str,
) -> None:
    def refuse(asked: str, mails: int) -> str | None:
        over = asked == command and mails > 5
        return "452 4.4.5 Maximum number of messages per session exceeded" if over else None

    server = MailServer(refuse)
    async with scripted(server) as relay, pool_for(relay, limits=Limits(sessions=4)) as pool:
        world = World(pool)  # type: ignore[arg-type]
        handling = [handle(world.sender, mx_ok(id=id_)) for id_ in task_ids(100)]
        assert_sent_at_the_first_attempt(await asyncio.wait_for(asyncio.gather(*handling), 30))
        assert set(server.copies.values()) == {1}
        assert len(server.copies) == 100
        await world.shared.close()


async def test_a_session_that_the_relay_ends_costs_its_mail_no_attempt() -> None:
    def refuse(asked: str, mails: int) -> str | None:
        return "!451 4.4.2 Timeout waiting for data from client." if (asked, mails) == ("MAIL", 2) else None

    server = MailServer(refuse)
    async with scripted(server) as relay, pool_for(relay) as pool:
        world = World(pool)  # type: ignore[arg-type]
        outcomes = [await asyncio.wait_for(handle(world.sender, mx_ok(id=id_)), 20) for id_ in task_ids(6)]
        assert_sent_at_the_first_attempt(outcomes)
        assert set(server.copies.values()) == {1}
        await world.shared.close()
