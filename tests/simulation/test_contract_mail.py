"""The in-memory mail server and pool behave like the SMTP client and a server. Each test runs on both."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import pytest

from services.sender.replies import InDoubt, LeaseLost, NotSent, Phase, Rejected, Sent
from services.sender.smtp_pool import OutgoingMail, Relay, SmtpPool, Tls
from tests.simulation.loop import Loop
from tests.simulation.mail import MailServer, Pool
from tests.simulation.process import Process
from tests.simulation.scheduler import Scheduler
from tests.simulation.world import World
from tests.stack import Infra, running

Send = Callable[..., Awaitable[Any]]


def message(id_: str) -> bytes:
    return f"From: a@post.test\r\nMessage-ID: <{id_}@post.test>\r\nSubject: s\r\n\r\ntext\r\n".encode()


class Memory:
    """The simulation's server and pool, on a loop in virtual time."""

    # The recipient for each ending.
    names: ClassVar[dict[str, str]] = {
        name: f"{name}@x.test"
        for name in (
            "ok",
            "reject",
            "reject_after_dot",
            "defer",
            "drop_before",
            "kept_unheard",
            "lost_unheard",
            "slow",
        )
    }

    def __init__(self) -> None:
        self.scheduler = Scheduler(3)
        self.world = World(self.scheduler)
        self.server = MailServer(self.world, {rcpt: (name,) for name, rcpt in self.names.items()})
        self.process = Process(self.scheduler, "sender-1", "sender")

    def run(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Run `work(pool)` to its end."""
        loop: Loop = self.process.loop

        async def begin() -> Any:
            return await work(Pool(self.server))

        task: list[asyncio.Task[Any]] = []
        self.scheduler.after(0, self.process, lambda: task.append(loop.create_task(begin())))
        self.scheduler.run(self.scheduler.now + 100)
        return task[0].result()

    def copies(self, id_: str) -> int:
        """Return how often the server took a message."""
        return sum(1 for copy in self.server.journal if copy.message_id == f"<{id_}@post.test>")

    def relay(self, up: bool) -> None:
        """Stop the server, or start it again."""
        self.world.away["relay"] = 0.0 if up else 1e9

    def finish(self) -> None:
        """End all processes."""
        self.scheduler.dispose()


class Real:
    """The catcher and the real pool."""

    names: ClassVar[dict[str, str]] = {
        "ok": "ok@x.test",
        "reject": "reject5@x.test",
        "reject_after_dot": "data5@x.test",
        "defer": "greylist-always@x.test",
        "drop_before": "drop-before-always@x.test",
        "kept_unheard": "drop-after-always@x.test",
        "lost_unheard": "drop-lost-always@x.test",
        "slow": "slow-1500@x.test",
    }

    def __init__(self, infra: Infra) -> None:
        self.infra = infra
        self.address = infra.smtp

    def run(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        async def begin() -> Any:
            pool = SmtpPool(Relay(*self.address, tls=Tls.NONE))
            try:
                return await work(pool)
            finally:
                await pool.close(0)

        return asyncio.run(begin())

    def copies(self, id_: str) -> int:
        return sum(1 for line in self.infra.journal() if line["message_id"] == f"<{id_}@post.test>")

    def relay(self, up: bool) -> None:
        self.infra.control_mail(connect="ok" if up else "refuse")
        # The catcher reads its control file ten times a second.
        self.run(lambda pool: _until_relay(pool, up))

    def finish(self) -> None:
        self.relay(True)


async def _until_relay(pool: Any, up: bool) -> None:
    deadline = time.monotonic() + 10
    host, port = pool.relay.host, pool.relay.port
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            there = True
        except OSError:
            there = False
        if there == up:
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def catcher() -> Iterator[Infra]:
    """A mail catcher of this module alone, because a test makes it refuse connections."""
    away = "127.0.0.1:1"
    # The stack starts nothing that a variable gives.
    given = {"POSTROAD_KAFKA_BOOTSTRAP": away, "POSTROAD_DNS_SERVERS": away}
    given["POSTROAD_DATABASE_URL"] = f"mysql://nobody@{away}/none"
    with running(Infra(Path(tempfile.mkdtemp(prefix="postroad-")), given), "--infra-only") as servers:
        yield servers


@pytest.fixture(params=["memory", "catcher"])
def side(request: pytest.FixtureRequest) -> Iterator[Memory | Real]:
    made = Memory() if request.param == "memory" else Real(request.getfixturevalue("catcher"))
    yield made
    made.finish()


def submit(
    pool: Any, rcpt: str, message_: bytes, guard: Callable[[], bool]
) -> tuple[OutgoingMail, asyncio.Future[Any]]:
    """Submit a mail; return it and its result."""
    result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    mail = OutgoingMail("a@post.test", rcpt, message_, guard, result.set_result)
    pool.submit(mail)
    assert not result.done(), "the result never comes inside `submit`"
    return mail, result


def send(side: Memory | Real, ending: str, guard: Callable[[], bool] = lambda: True) -> tuple[Any, int]:
    """Send one mail whose delivery ends in this way. Return the result and how often the server took it."""
    id_ = str(uuid4())

    async def sent(pool: Any) -> Any:
        return await submit(pool, side.names[ending], message(id_), guard)[1]

    result = side.run(sent)
    return result, side.copies(id_)


def test_a_mail_that_is_taken_is_sent(side: Memory | Real) -> None:
    result, copies = send(side, "ok")
    assert isinstance(result, Sent)
    assert result.reply.startswith("250")
    assert copies == 1


@pytest.mark.parametrize(
    ("ending", "phase", "permanent"),
    [
        ("reject", Phase.ENVELOPE, True),
        ("defer", Phase.ENVELOPE, False),
        ("reject_after_dot", Phase.AFTER_DOT, True),
    ],
)
def test_a_refusal_has_its_phase_and_no_mail_is_taken(
    side: Memory | Real, ending: str, phase: Phase, permanent: bool
) -> None:
    result, copies = send(side, ending)
    assert isinstance(result, Rejected)
    assert (result.phase, result.permanent, copies) == (phase, permanent, 0)


def test_no_mail_is_taken_when_the_connection_is_lost_before_the_end_of_the_message(
    side: Memory | Real,
) -> None:
    result, copies = send(side, "drop_before")
    assert isinstance(result, NotSent)
    assert (result.spares_attempt, copies) == (False, 0)


@pytest.mark.parametrize(("ending", "kept"), [("kept_unheard", 1), ("lost_unheard", 0)])
def test_a_lost_reply_is_a_doubt_whether_or_not_the_mail_was_taken(
    side: Memory | Real, ending: str, kept: int
) -> None:
    result, copies = send(side, ending)
    assert isinstance(result, InDoubt)
    assert copies == kept


@pytest.mark.parametrize(("answers", "phase"), [([False], Phase.ENVELOPE), ([True, False], Phase.DATA)])
def test_the_guard_stops_a_send_before_the_envelope_and_before_the_message(
    side: Memory | Real, answers: list[bool], phase: Phase
) -> None:
    left = iter(answers)
    result, copies = send(side, "ok", lambda: next(left))
    assert isinstance(result, LeaseLost)
    assert (result.phase, copies) == (phase, 0)
    assert next(left, None) is None, "the guard is not called again"


@pytest.mark.parametrize(("cut", "ended"), [(False, Sent), (True, InDoubt)])
def test_a_handed_over_mail_is_not_withdrawn_and_goes_on_unless_it_is_cut_off(
    side: Memory | Real, cut: bool, ended: type
) -> None:
    id_ = str(uuid4())

    async def cancel(pool: Any) -> Any:
        asked = 0
        handed_over = asyncio.Event()

        def guard() -> bool:
            nonlocal asked
            asked += 1
            if asked == 2:
                asyncio.get_running_loop().call_later(0.5, handed_over.set)
            return True

        mail, result = submit(pool, side.names["slow"], message(id_), guard)
        await handed_over.wait()
        assert not pool.withdraw(mail)
        assert not result.done()
        if cut:
            pool.cut_off(mail)
        return await result

    assert isinstance(side.run(cancel), ended)
    assert side.copies(id_) == 1


def test_a_mail_withdrawn_before_its_message_is_not_taken_and_has_no_result(side: Memory | Real) -> None:
    id_ = str(uuid4())

    async def cancel(pool: Any) -> Any:
        withdrawn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def guard() -> bool:
            asyncio.get_running_loop().call_soon(lambda: withdrawn.set_result(pool.withdraw(mail)))
            return True

        mail, result = submit(pool, side.names["ok"], message(id_), guard)
        assert await withdrawn
        await asyncio.sleep(0.5)
        return result.done()

    assert not side.run(cancel)
    assert side.copies(id_) == 0


def test_a_relay_that_is_away_costs_no_attempt_and_the_pool_waits_for_it(side: Memory | Real) -> None:
    id_ = str(uuid4())

    async def away(pool: Any) -> Any:
        result = await submit(pool, side.names["ok"], message(id_), lambda: True)[1]
        return result, pool.available

    side.relay(False)
    result, available = side.run(away)
    assert isinstance(result, NotSent)
    assert (result.spares_attempt, available, side.copies(id_)) == (True, False, 0)
    side.relay(True)
    assert isinstance(send(side, "ok")[0], Sent)
