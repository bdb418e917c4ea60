"""The SMTP client and its mails against a real Postfix."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from email.message import EmailMessage
from itertools import count
from typing import Any

import pytest

from services.sender.message import build
from services.sender.replies import InDoubt, NotSent, Phase, Rejected, SendResult, Sent, TransactionStep
from services.sender.smtp_pool import Credentials, Limits, Relay, SmtpPool, Timeouts, Tls
from tests.integration.smtp.script import Sending, count_chained
from tests.integration.smtp.script import send as submitted
from tests.postfix import PASSWORD, USER, Postfix, missing, postfix

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

FROM = "shop@example.org"
_numbers = count(1)


class Greylist:
    """A policy server for Postfix (SMTPD_POLICY_README) that defers each recipient ``grey*`` once."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked = (await reader.readuntil(b"\n\n")).decode()
                recipient = dict(line.split("=", 1) for line in asked.split())["recipient"]
                self._seen[recipient] += 1
                grey = recipient.startswith("grey") and self._seen[recipient] == 1
                action = "450 4.2.0 Greylisted, retry in 90 seconds" if grey else "DUNNO"
                writer.write(f"action={action}\n\n".encode())
        writer.close()

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Postfix]:
    greylist = Greylist()
    try:
        with postfix(greylist.port) as running:
            yield running
    finally:
        greylist.stop()


@asynccontextmanager
async def pool_to(
    server: Postfix, port: int, tls: Tls = Tls.STARTTLS, **settings: Any
) -> AsyncIterator[SmtpPool]:
    limits = settings.pop("limits", Limits(sessions=4, backoff=0.05))
    timeouts = settings.pop("timeouts", Timeouts(opening=20, command=20, data=20, after_dot=20))
    relay = Relay(
        "127.0.0.1", port, tls, context=None if tls is Tls.NONE else server.certificates.client(), **settings
    )
    pool = SmtpPool(relay, limits=limits, timeouts=timeouts)
    try:
        yield pool
    finally:
        await pool.close(grace=0)


def mail(to: str = "ann@local.test", **more: Any) -> tuple[str, bytes]:
    """Return a new message id and its mail."""
    message_id = f"<{next(_numbers)}.test@example.org>"
    fields: dict[str, Any] = {"subject": "Your order", "date": 1_700_000_000, "text": "It is on its way.\n"}
    return message_id, build(message_id=message_id, from_addr=FROM, to_addr=to, **(fields | more))


async def send(pool: SmtpPool, to: str = "ann@local.test", **more: Any) -> SendResult:
    return await submitted(pool, mail(to, **more)[1], rcpt=to)


# --- Accepted


@pytest.mark.parametrize("way", ["clear", "starttls", "submission", "submissions"])
async def test_mail_arrives_every_way(server: Postfix, way: str) -> None:
    port, tls, credentials = {
        "clear": (server.mx_port, Tls.NONE, None),
        "starttls": (server.mx_port, Tls.STARTTLS, None),
        "submission": (server.submission_port, Tls.STARTTLS, Credentials(USER, PASSWORD)),
        "submissions": (server.submissions_port, Tls.IMPLICIT, Credentials(USER, PASSWORD, "LOGIN")),
    }[way]
    message_id, message = mail(subject="Grüße", text="Bestätigt.\n.\n..\nEnde\n")
    async with pool_to(server, port, tls, credentials=credentials) as pool:
        result = await submitted(pool, message, rcpt="ann@local.test")
        assert isinstance(result, Sent), result
        assert result.reply.startswith("250 2.0.0 Ok: queued as ")
        (parsed,) = (await asyncio.to_thread(server.wait_for, message_id))[message_id]
    assert isinstance(parsed, EmailMessage)
    assert parsed["subject"] == "Grüße"
    assert parsed["return-path"] == f"<{FROM}>"
    assert parsed.get_content().replace("\r\n", "\n") == "Bestätigt.\n.\n..\nEnde\n"


async def test_many_mails_over_few_sessions_arrive_once_each(server: Postfix) -> None:
    mails = [mail() for _ in range(60)]
    async with pool_to(server, server.mx_port) as pool:
        results = await asyncio.gather(
            *(submitted(pool, message, rcpt="ann@local.test") for _, message in mails)
        )
        assert {type(result) for result in results} == {Sent}
        assert pool.state.opened <= 4
    arrived = await asyncio.to_thread(server.wait_for, *(message_id for message_id, _ in mails))
    assert [len(arrived[message_id]) for message_id, _ in mails] == [1] * 60


async def test_chained_mails_arrive_once_each_and_refused_ones_never(server: Postfix) -> None:
    mails: dict[str, Sending] = {}
    expected: dict[str, type] = {}
    async with pool_to(server, server.mx_port, Tls.NONE, limits=Limits(sessions=2)) as pool:
        chained = count_chained(pool)
        for number in range(80):
            to, more = {3: ("gone@local.test", {}), 5: ("ann@local.test", {"subject": "unwanted"})}.get(
                number % 8, ("ann@local.test", {})
            )
            message_id, message = mail(to, **more)
            mails[message_id] = Sending(pool, message, mail_from=FROM, rcpt=to)
            expected[message_id] = Sent if number % 8 not in (3, 5) else Rejected
        assert {message_id: type(await one.result()) for message_id, one in mails.items()} == expected
        assert len(chained) > 20
        # Postfix takes them, and refuses no session for them.
        assert pool.state.opened == 2
    sent = [message_id for message_id, kind in expected.items() if kind is Sent]
    arrived = await asyncio.to_thread(server.wait_for, *sent)
    assert {message_id: len(arrived.get(message_id, [])) for message_id in mails} == {
        message_id: int(kind is Sent) for message_id, kind in expected.items()
    }


async def test_non_ascii_recipient(server: Postfix) -> None:
    message_id, message = mail("büro@local.test")
    async with pool_to(server, server.mx_port) as pool:
        assert isinstance(await submitted(pool, message, rcpt="büro@local.test"), Sent)
    (arrived,) = (await asyncio.to_thread(server.wait_for, message_id))[message_id]
    assert arrived["to"] == "büro@local.test"


async def test_a_mail_near_the_size_limit(server: Postfix) -> None:
    message_id, message = mail(text="A line of an ordinary mail.\n" * 6500)
    assert 180_000 < len(message) < 200_000
    async with pool_to(server, server.mx_port) as pool:
        assert isinstance(await submitted(pool, message, rcpt="ann@local.test"), Sent)
    await asyncio.to_thread(server.wait_for, message_id)


# --- Refused


@pytest.mark.parametrize(
    ("to", "more", "expected"),
    [
        ("gone@local.test", {}, Rejected(Phase.ENVELOPE, "550 5.1.1", True, step=TransactionStep.RCPT)),
        ("full@local.test", {}, Rejected(Phase.ENVELOPE, "452 4.2.2", False, step=TransactionStep.RCPT)),
        (
            "closing@local.test",
            {},
            Rejected(Phase.ENVELOPE, "421 4.3.2", False, about_session=True, step=TransactionStep.RCPT),
        ),
        ("ann@elsewhere.test", {}, Rejected(Phase.ENVELOPE, "554 5.7.1", True, step=TransactionStep.RCPT)),
        (
            "ann@local.test",
            {"subject": "unwanted"},
            Rejected(Phase.AFTER_DOT, "550 5.7.1", True, step=TransactionStep.MESSAGE),
        ),
        (
            "ann@local.test",
            {"text": "unwanted body"},
            Rejected(Phase.AFTER_DOT, "550 5.6.0", True, step=TransactionStep.MESSAGE),
        ),
        (
            "later@local.test",
            {},
            Rejected(Phase.AFTER_DOT, "451 4.7.1", False, 300.0, step=TransactionStep.MESSAGE),
        ),
        (
            "closingafter@local.test",
            {},
            Rejected(Phase.AFTER_DOT, "421 4.3.2", False, about_session=True, step=TransactionStep.MESSAGE),
        ),
        ("ann@local.test", {"text": "x" * 300_000}, Rejected(Phase.ENVELOPE, "552 5.3.4", True)),
    ],
)
async def test_refusals(server: Postfix, to: str, more: dict[str, str], expected: Rejected) -> None:
    async with pool_to(server, server.mx_port, limits=Limits(sessions=1)) as pool:
        result = await send(pool, to, **more)
        assert isinstance(result, Rejected), result
        assert result.reply.startswith(expected.reply)
        assert replace(result, reply=expected.reply, relay="") == expected
        # The next mail finds a session that works. It is the same one unless the server announced its end,
        # both to the mail and to its second try.
        assert isinstance(await send(pool), Sent)
        assert pool.state.opened == (3 if expected.about_session else 1)


async def test_a_refused_sender(server: Postfix) -> None:
    async with pool_to(server, server.mx_port) as pool:
        result = await submitted(pool, mail()[1], mail_from="banned@example.org", rcpt="ann@local.test")
        # The relay would accept no mail from this address.
        assert isinstance(result, NotSent)
        assert (result.phase, result.spares_attempt) == (Phase.ENVELOPE, True)
        assert "Sender address rejected" in result.cause


async def test_greylisting(server: Postfix, request: pytest.FixtureRequest) -> None:
    to = f"grey{next(_numbers)}@local.test"
    message_id, message = mail(to)
    async with pool_to(server, server.mx_port) as pool:
        first = await submitted(pool, message, rcpt=to)
        assert isinstance(first, Rejected)
        assert (first.permanent, first.retry_after) == (False, 90.0)
        assert isinstance(await submitted(pool, message, rcpt=to), Sent)
    await asyncio.to_thread(server.wait_for, message_id)


# --- Ours


async def test_a_wrong_password_spares_the_attempt(
    server: Postfix, capsys: pytest.CaptureFixture[str]
) -> None:
    credentials = Credentials(USER, "wrong s3cret")
    async with pool_to(server, server.submission_port, credentials=credentials) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert (result.phase, result.spares_attempt) == (Phase.AUTH, True)
        assert result.cause.startswith("535 5.7.8")
        assert not pool.available
    assert "s3cret" not in capsys.readouterr().out


async def test_a_demand_for_tls_spares_the_attempt(server: Postfix) -> None:
    async with pool_to(server, server.submission_port, Tls.NONE) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert result.spares_attempt
        assert result.cause.startswith("530 5.7.0")


async def test_missing_auth_in_clear_spares_the_attempt(server: Postfix) -> None:
    async with pool_to(server, server.mx_port, Tls.NONE, credentials=Credentials(USER, PASSWORD)) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert (result.phase, result.spares_attempt) == (Phase.AUTH, True)


# --- Sessions


async def test_a_session_that_postfix_timed_out_is_not_used(server: Postfix) -> None:
    async with pool_to(server, server.narrow_port, limits=Limits(sessions=1)) as pool:
        assert isinstance(await send(pool), Sent)
        async with asyncio.timeout(20):
            while pool.state.idle:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert isinstance(await send(pool), Sent)
        assert pool.state.opened == 2


async def test_postfix_takes_fewer_sessions_than_the_limit(server: Postfix) -> None:
    async with pool_to(server, server.narrow_port, limits=Limits(sessions=8, backoff=0.05)) as pool:
        first = [await send(pool)]
        results = first + await asyncio.gather(*(send(pool) for _ in range(60)))
        assert {type(result) for result in results} == {Sent}
        assert pool.available
        assert pool.state.busy + pool.state.idle <= 2


# --- The line between the two is cut


@asynccontextmanager
async def cutting(port: int, cut: Callable[[bytes, bytes], bool]) -> AsyncIterator[int]:
    """A line to ``port`` that breaks, for good, once ``cut(all from the client, all from the server)``.

    What made it break is passed on to the server, and never to the client.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        heard = {"client": b"", "server": b""}

        async def carry(side: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                heard[side] += data
                if cut(heard["client"], heard["server"]):
                    if side == "client":
                        sink.write(data)
                        await sink.drain()
                        # It waits for the server's reply and drops it.
                        await from_server.readline()
                    writer.transport.abort()
                    break
                sink.write(data)
                await sink.drain()
            sink.close()

        both = [
            asyncio.create_task(carry("client", reader, to_server)),
            asyncio.create_task(carry("server", from_server, writer)),
        ]
        tasks.update(both)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        to_server.close()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_lost_reply_is_in_doubt_and_the_mail_has_arrived(server: Postfix) -> None:
    message_id, message = mail()

    def replied(client: bytes, reply: bytes) -> bool:
        return b"2.0.0 Ok: queued" in reply

    async with cutting(server.mx_port, replied) as port, pool_to(server, port, Tls.NONE) as pool:
        result = await submitted(pool, message, rcpt="ann@local.test")
        assert isinstance(result, InDoubt)
    assert len((await asyncio.to_thread(server.wait_for, message_id))[message_id]) == 1


async def test_a_connection_cut_before_the_354_is_not_sent(server: Postfix) -> None:
    def envelope(client: bytes, reply: bytes) -> bool:
        return b"354 " in reply

    async with cutting(server.mx_port, envelope) as port, pool_to(server, port, Tls.NONE) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert not result.spares_attempt
