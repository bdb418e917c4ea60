"""The SMTP client against aiosmtpd, a real server without PIPELINING."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from services.sender.replies import NotSent, Phase, Rejected, SendResult, Sent
from services.sender.smtp_pool import Credentials, Limits, Relay, SmtpPool, Tls
from tests.certificates import Certificates, make_certificates
from tests.integration.smtp.script import FROM, QUICK, until
from tests.integration.smtp.script import send as submitted

MESSAGE = b"Subject: hi\r\n\r\n.\r\n..two\r\nend\r\n"


class Catcher:
    """Keeps the mails; refuses some recipients and some messages."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("gone"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if envelope.rcpt_tos[0].startswith("spam"):
            return "554 5.7.1 spam"
        self.envelopes.append(envelope)
        return "250 2.0.0 queued"


def authenticate(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
    assert isinstance(data, LoginPassword)
    return AuthResult(success=data.password == b"correct horse", handled=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@asynccontextmanager
async def serving(certificates: Certificates, **settings: Any) -> AsyncIterator[tuple[Catcher, int]]:
    catcher = Catcher()
    tls: ssl.SSLContext = certificates.server()

    def session() -> SMTP:
        return SMTP(
            catcher,
            enable_SMTPUTF8=True,
            tls_context=tls,
            authenticator=authenticate,
            data_size_limit=100_000,
            **settings,
        )

    listener = await asyncio.get_running_loop().create_server(session, "127.0.0.1", 0)
    try:
        yield catcher, listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


def pool_to(port: int, certificates: Certificates, password: str | None = None, **settings: Any) -> SmtpPool:
    credentials = None if password is None else Credentials("ann", password, settings.pop("mechanism", None))
    relay = Relay("127.0.0.1", port, credentials=credentials, context=certificates.client(), **settings)
    return SmtpPool(relay, limits=Limits(sessions=2), timeouts=QUICK)


async def send(pool: SmtpPool, to: str = "ann@example.net", message: bytes = MESSAGE) -> SendResult:
    return await submitted(pool, message, rcpt=to)


@pytest.mark.parametrize("mechanism", [None, "PLAIN", "LOGIN"])
async def test_mail_with_starttls_and_auth(certificates: Certificates, mechanism: str | None) -> None:
    async with serving(certificates, auth_required=True) as (catcher, port):
        pool = pool_to(port, certificates, "correct horse", mechanism=mechanism)
        results = await asyncio.gather(*(send(pool) for _ in range(20)))
        await until(lambda: pool.state.opened == 2)
        await pool.close()
    assert {type(result) for result in results} == {Sent}
    assert [envelope.original_content for envelope in catcher.envelopes] == [MESSAGE] * 20
    assert {envelope.mail_from for envelope in catcher.envelopes} == {FROM}


async def test_a_wrong_password(certificates: Certificates) -> None:
    async with serving(certificates, auth_required=True) as (_, port):
        pool = pool_to(port, certificates, "wrong")
        result = await send(pool)
        await pool.close()
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.AUTH, True)


async def test_auth_is_required_and_there_are_no_credentials(certificates: Certificates) -> None:
    async with serving(certificates, auth_required=True) as (_, port):
        pool = pool_to(port, certificates)
        result = await send(pool)
        await pool.close()
    assert isinstance(result, NotSent)
    assert result.spares_attempt


async def test_refusals_leave_the_session_usable(certificates: Certificates) -> None:
    async with serving(certificates) as (catcher, port):
        pool = pool_to(port, certificates, tls=Tls.NONE)
        gone, spam, ann = [await send(pool, f"{name}@example.net") for name in ("gone", "spam", "ann")]
        await pool.close()
    assert isinstance(gone, Rejected)
    assert (gone.phase, gone.permanent) == (Phase.ENVELOPE, True)
    assert isinstance(spam, Rejected)
    assert (spam.phase, spam.permanent) == (Phase.AFTER_DOT, True)
    assert isinstance(ann, Sent)
    assert len(catcher.envelopes) == pool.state.opened == 1


async def test_size_and_utf8(certificates: Certificates) -> None:
    async with serving(certificates) as (catcher, port):
        pool = pool_to(port, certificates, tls=Tls.NONE)
        big = await send(pool, message=b"x\r\n" * 40_000)
        utf8 = await send(pool, "büro@example.net", "To: büro@example.net\r\n\r\nGrüße\r\n".encode())
        await pool.close()
    assert isinstance(big, Rejected)
    assert big.reply.startswith("552 5.3.4")
    assert isinstance(utf8, Sent)
    assert [envelope.rcpt_tos for envelope in catcher.envelopes] == [["büro@example.net"]]
