"""A domain that hangs does not use all sessions, though the relay takes fewer than the sender may open."""

import asyncio
from collections import Counter

from services.sender.replies import Sent
from services.sender.smtp_pool import Limits, SmtpPool
from tests.integration.smtp.script import Conversation, Sending, pool_for, scripted, until

HUNG, OTHER = "ann@hung.test", "bob@other.test"


class Relay:
    """Takes `sessions` at a time. It answers no RCPT to hung.test before `recovered`."""

    def __init__(self, sessions: int) -> None:
        self.sessions = sessions
        self.open = self.refused = 0
        self.recovered = asyncio.Event()
        self.hanging: Counter[Conversation] = Counter()

    async def __call__(self, c: Conversation) -> None:
        if self.open >= self.sessions:
            self.refused += 1
            await c.say("421 4.7.0 too many connections from you")
            await c.drained()
            return
        self.open += 1
        try:
            await c.greet("PIPELINING")
            await self._take_mails(c)
        finally:
            self.open -= 1

    async def _take_mails(self, c: Conversation) -> None:
        while (line := await c.line()) and line != b"QUIT":
            if line != b"RSET":
                if b"hung.test" in await c.line() and not self.recovered.is_set():
                    self.hanging[c] += 1
                    await self.recovered.wait()
                    del self.hanging[c]
                await c.expect("DATA")
                await c.say("250 ok", "250 ok", "354 go on")
                await c.message()
            await c.say("250 ok")


async def meet(pool: SmtpPool) -> None:
    """Have the pool find out how many sessions the relay takes."""
    assert isinstance(await Sending(pool, rcpt=OTHER).result(), Sent)
    mails = [Sending(pool, rcpt=OTHER) for _ in range(20)]
    assert {type(await mail.result()) for mail in mails} == {Sent}
    await until(lambda: pool.state.opening == 0)


async def test_a_domain_that_hangs_leaves_sessions_where_the_relay_takes_fewer() -> None:
    script = Relay(sessions=2)
    limits = Limits(sessions=8, per_domain=6, backoff=0.05, backoff_max=0.05)
    async with scripted(script) as relay, pool_for(relay, limits=limits) as pool:
        await meet(pool)
        hung = [Sending(pool, rcpt=HUNG) for _ in range(6)]
        await until(lambda: len(script.hanging) > 0)
        # The pool goes on asking for more sessions.
        refused = script.refused
        await until(lambda: script.refused > refused + 6)
        for _ in range(3):
            assert isinstance(await Sending(pool, rcpt=OTHER).result(), Sent)
        assert len(script.hanging) == 1
        script.recovered.set()
        assert {type(await mail.result()) for mail in hung} == {Sent}


async def test_a_domain_gets_more_sessions_once_the_relay_takes_more() -> None:
    script = Relay(sessions=1)
    limits = Limits(sessions=8, per_domain=6, backoff=0.05, backoff_max=0.05)
    async with scripted(script) as relay, pool_for(relay, limits=limits) as pool:
        await meet(pool)
        hung = [Sending(pool, rcpt=HUNG) for _ in range(6)]
        await until(lambda: len(script.hanging) == 1)
        script.sessions = 8
        await until(lambda: len(script.hanging) == 6)
        script.recovered.set()
        assert {type(await mail.result()) for mail in hung} == {Sent}
