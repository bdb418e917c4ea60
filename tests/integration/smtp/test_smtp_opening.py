"""Opening a session: banner, EHLO, extensions, TLS, AUTH. A failure here costs no attempt."""

import asyncio
import base64
import ssl
from pathlib import Path
from typing import Any

import pytest

from services.sender.oauth import TokenError
from services.sender.replies import InDoubt, NotSent, Phase, Rejected, SendResult, Sent
from services.sender.smtp_pool import Credentials, Relay, SmtpPool, Timeouts, Tls
from tests.certificates import Certificates, make_certificates
from tests.integration.smtp.script import (
    FROM,
    MESSAGE,
    TO,
    Conversation,
    Script,
    pool_for,
    result_of,
    scripted,
    send,
)

USER = Credentials("ann", "s3cret-of-ann")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"), "localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def other_name(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("other"), "elsewhere.example")


async def refusal_of(script: Script, **settings: Any) -> NotSent:
    """Return the result, a NotSent that spares the attempt. The pool must be down, and no secret shown."""
    async with scripted(script) as server, pool_for(server, **settings) as pool:
        result = await send(pool)
        assert isinstance(result, NotSent), result
        assert result.spares_attempt
        assert not pool.available
        assert pool.state.trouble == result
        assert "s3cret" not in f"{result} {pool.relay} {pool.state}"
        return result


# --- Banner and EHLO


@pytest.mark.parametrize("banner", ["554 no service here", "421 busy", "450 later", "354 what?", "hello"])
async def test_an_unfriendly_banner(banner: str) -> None:
    async def script(c: Conversation) -> None:
        await c.say(banner)
        await c.drained()

    result = await refusal_of(script)
    assert result.phase is Phase.CONNECT
    assert banner in result.cause


async def test_nobody_listens() -> None:
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    result = await send(SmtpPool(Relay("127.0.0.1", port, tls=Tls.NONE)))
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)


async def test_a_name_that_does_not_resolve() -> None:
    pool = SmtpPool(Relay("relay.invalid", 25, tls=Tls.NONE))
    result = await send(pool)
    assert isinstance(result, NotSent)
    assert (result.phase, result.spares_attempt) == (Phase.CONNECT, True)
    await pool.close()


@pytest.mark.parametrize("reply", [[], ["220 hello"]])
async def test_a_server_that_hangs(reply: list[str]) -> None:
    async def script(c: Conversation) -> None:
        await c.say(*reply)
        await c.drained()

    result = await refusal_of(script, timeouts=Timeouts(opening=0.3, quit=1))
    assert result.phase is Phase.CONNECT
    assert "timed out" in result.cause


async def test_helo_for_a_server_without_ehlo() -> None:
    async def script(c: Conversation) -> None:
        await c.say("220 old")
        await c.expect("EHLO [127.0.0.1]")
        await c.say("502 what?")
        await c.expect("HELO [127.0.0.1]")
        await c.say("250 old")
        for command in ("MAIL", "RCPT", "DATA"):
            await c.expect(command)
            await c.say("354 go on" if command == "DATA" else "250 ok")
        await c.message()
        await c.say("250 ok")
        await c.ended()

    assert isinstance(await result_of(script), Sent)


@pytest.mark.parametrize(
    "refusal",
    [
        "421 4.7.0 Try again later, closing connection. (EHLO)",
        "501 5.5.4 invalid HELO",
        "550 5.7.1 literal not allowed",
    ],
)
async def test_a_relay_that_refuses_address_literals(refusal: str) -> None:
    async def script(c: Conversation) -> None:
        await c.say("220 hi")
        while (line := await c.line()) and line != b"QUIT":
            if line != b"EHLO mail.example.org":
                await c.say(refusal)
                continue
            await c.say("250-hi", "250 PIPELINING")
            await c.mail()

    assert isinstance(await result_of(script, client_name="mail.example.org"), Sent)
    result = await refusal_of(script)
    assert (result.phase, result.cause) == (Phase.CONNECT, refusal)


async def test_keywords_are_read_whatever_their_case(certificates: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("StartTls")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        await c.start_tls(certificates.server())
        await c.expect("EHLO ")
        await c.say("250-scripted", "250-Pipelining", "250-Size 1000", "250-8BitMime", "250 Auth Plain")
        await c.expect("AUTH PLAIN ")
        await c.say("235 welcome")
        await c.mail()
        [line] = [line for line in c.heard if line.startswith(b"MAIL")]
        assert b" SIZE=" in line
        assert b" BODY=8BITMIME" in line
        await c.ended()

    message = "Subject: hi\r\n\r\nGrüße\r\n".encode()
    result = await result_of(
        script, message, tls=Tls.STARTTLS, context=certificates.client(), credentials=USER
    )
    assert isinstance(result, Sent)


async def test_the_client_name_can_be_given() -> None:
    async def script(c: Conversation) -> None:
        await c.say("220 hi")
        await c.expect("EHLO sender.example.org")
        await c.say("421 not you")
        await c.ended()

    assert (await refusal_of(script, client_name="sender.example.org")).cause == "421 not you"


# --- What the server can do


async def parameters(*extensions: str, mail: tuple[str, str, bytes]) -> tuple[SendResult, bytes]:
    """Return the result of ``mail``, and the parameters of MAIL FROM."""

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", *extensions)
        await c.perhaps()

    async with scripted(script) as server, pool_for(server) as pool:
        result = await send(pool, mail[2], mail_from=mail[0], rcpt=mail[1])
    heard = [line for line in server.conversations[0].heard if line.startswith(b"MAIL")]
    return result, heard[0].partition(b">")[2] if heard else b""


UTF8_MAIL = (FROM, "büro@xn--bcher-kva.example", "To: büro@xn--bcher-kva.example\r\n\r\nhi\r\n".encode())
EIGHT_BIT = (FROM, TO, "Subject: hi\r\n\r\nGrüße\r\n".encode())


@pytest.mark.parametrize(
    ("extensions", "mail", "expected"),
    [
        (["SIZE"], (FROM, TO, MESSAGE), b" SIZE=%d" % len(MESSAGE)),
        (["SIZE 0"], (FROM, TO, MESSAGE), b" SIZE=%d" % len(MESSAGE)),
        (["size 1000"], (FROM, TO, MESSAGE), b" SIZE=%d" % len(MESSAGE)),
        (["8BITMIME", "SMTPUTF8"], (FROM, TO, MESSAGE), b""),
        (["8BITMIME", "SMTPUTF8"], EIGHT_BIT, b" BODY=8BITMIME"),
        (["8BITMIME", "SMTPUTF8"], UTF8_MAIL, b" SMTPUTF8 BODY=8BITMIME"),
        (["X-ODD things", "AUTH=LOGIN"], (FROM, TO, MESSAGE), b""),
    ],
)
async def test_parameters_of_mail(
    extensions: list[str], mail: tuple[str, str, bytes], expected: bytes
) -> None:
    result, reply = await parameters(*extensions, mail=mail)
    assert isinstance(result, Sent)
    assert reply == expected


@pytest.mark.parametrize(
    ("extensions", "mail", "code"),
    [
        (["SIZE 10"], (FROM, TO, MESSAGE), "552 5.3.4"),
        (["8BITMIME"], UTF8_MAIL, "550 5.6.7"),
        (["SMTPUTF8"], EIGHT_BIT, "554 5.6.3"),
        ([], EIGHT_BIT, "554 5.6.3"),
    ],
)
async def test_a_mail_that_the_server_cannot_take_is_not_sent(
    extensions: list[str], mail: tuple[str, str, bytes], code: str
) -> None:
    result, reply = await parameters(*extensions, mail=mail)
    assert isinstance(result, Rejected)
    assert result.permanent
    assert result.reply.startswith(code)
    assert reply == b""


# --- AUTH


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def test_auth_plain() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH LOGIN PLAIN")
        assert await c.line() == f"AUTH PLAIN {encoded(chr(0) + 'ann' + chr(0) + 's3cret-of-ann')}".encode()
        await c.say("235 2.7.0 welcome")
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, credentials=USER), Sent)


@pytest.mark.parametrize("offer", ["AUTH LOGIN", "AUTH=LOGIN", "auth login CRAM-MD5"])
async def test_auth_login(offer: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", offer)
        assert await c.line() == b"AUTH LOGIN"
        await c.say(f"334 {encoded('Username:')}")
        assert await c.line() == encoded("ann").encode()
        await c.say(f"334 {encoded('Password:')}")
        assert await c.line() == encoded("s3cret-of-ann").encode()
        await c.say("235 2.7.0 welcome")
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, credentials=USER), Sent)


async def test_auth_xoauth2() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN XOAUTH2")
        token = "user=ann\1auth=Bearer s3cret-token\1\1"
        assert await c.line() == f"AUTH XOAUTH2 {encoded(token)}".encode()
        await c.say("235 2.7.0 welcome")
        await c.mail()
        await c.ended()

    credentials = Credentials("ann", "s3cret-token", "XOAUTH2")
    assert isinstance(await result_of(script, credentials=credentials), Sent)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [('{"status":"401"}', '{"status":"401"}'), ('{"token":"s3cret-token"}', '{"token":"***"}')],
)
async def test_a_refusal_of_xoauth2_is_shown_with_its_reason_without_the_token(
    reason: str, shown: str
) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH XOAUTH2")
        await c.expect("AUTH XOAUTH2 ")
        await c.say("334 " + encoded(reason))
        assert await c.line() == b""
        await c.say("535 5.7.8 token expired")
        await c.ended()

    result = await refusal_of(script, credentials=Credentials("ann", "s3cret-token", "XOAUTH2"))
    assert (result.phase, result.cause) == (Phase.AUTH, f"535 5.7.8 token expired {shown}")


@pytest.mark.parametrize("reply", ["535 5.7.8 no", "534 5.7.9 too weak", "454 4.7.0 later", "421 no", "250-"])
async def test_auth_refused(reply: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN")
        await c.expect("AUTH PLAIN ")
        await c.say(reply)
        c.close()

    result = await refusal_of(script, credentials=USER)
    assert result.phase is Phase.AUTH
    reply = capsys.readouterr()
    assert "relay_down" in reply.out + reply.err
    for secret in ("s3cret", encoded("\0ann\0s3cret-of-ann")):
        assert secret not in reply.out + reply.err


@pytest.mark.parametrize(
    "last", ["500 5.5.1 not understood: {}", "{}", "500-what", "235 ok\r\n500 {}", "421 {}"]
)
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "XOAUTH2"])
async def test_no_secret_is_shown_of_a_relay_that_repeats_its_input(
    mechanism: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", f"AUTH {mechanism}")
        heard = (await c.line()).decode()
        if mechanism == "LOGIN":
            for _ in range(2):
                await c.say("334 VXNlcm5hbWU6")
                heard = (await c.line()).decode()
        await c.raw(f"500-{heard}\r\n{last.format(heard)}\r\n".encode())
        c.close()

    result = await refusal_of(script, credentials=Credentials("ann", "s3cret-of-ann", mechanism))
    shown = capsys.readouterr()
    assert "***" in result.cause
    for secret in ("s3cret-of-ann", "\0ann\0s3cret-of-ann", "user=ann\1auth=Bearer s3cret-of-ann\1\1"):
        for form in (secret, encoded(secret)):
            assert form not in f"{result} {shown.out} {shown.err}"


@pytest.mark.parametrize(
    ("extensions", "says"),
    [([], "AUTH not offered"), (["AUTH CRAM-MD5"], "CRAM-MD5"), (["AUTH"], "AUTH not offered")],
)
async def test_auth_that_is_not_offered(extensions: list[str], says: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", *extensions)
        await c.ended()

    result = await refusal_of(script, credentials=USER)
    assert result.phase is Phase.AUTH
    assert says in result.cause


PLAIN = encoded("\0ann\0s3cret-of-ann")


async def log_in(c: Conversation) -> None:
    assert await c.line() == b"AUTH LOGIN"
    await c.say(f"334 {encoded('Username:')}")
    assert await c.line() == encoded("ann").encode()
    await c.say(f"334 {encoded('Password:')}")
    assert await c.line() == encoded("s3cret-of-ann").encode()
    await c.say("235 2.7.0 welcome")


@pytest.mark.parametrize(
    "refusal", ["504 5.5.4 mechanism", "502 Invalid input", "535 Login fail", "553 5.3.0 Auth failure"]
)
@pytest.mark.parametrize(
    "ehlo", ["250 AUTH PLAIN LOGIN", "250-scripted\r\n250-PIPELINING\r\n250 auth=plain Login"]
)
async def test_login_is_tried_after_a_refusal_of_plain_and_first_from_then_on(
    refusal: str, ehlo: str
) -> None:
    async def hello(c: Conversation) -> None:
        await c.say("220 scripted")
        await c.expect("EHLO ")
        await c.say(*ehlo.split("\r\n"))

    async def one_mail(c: Conversation) -> None:
        if "PIPELINING" in ehlo:
            await c.mail()
        else:
            for command in ("MAIL", "RCPT", "DATA"):
                await c.expect(command)
                await c.say("354 go on" if command == "DATA" else "250 ok")
            await c.message()
            await c.say("250 ok")
        c.close()

    async def first(c: Conversation) -> None:
        await hello(c)
        await c.expect("AUTH PLAIN ")
        await c.say(refusal)
        await log_in(c)
        await one_mail(c)

    async def second(c: Conversation) -> None:
        await hello(c)
        await log_in(c)
        await one_mail(c)

    async with scripted(first, second) as server, pool_for(server, credentials=USER) as pool:
        assert isinstance(await send(pool), Sent)
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2


async def test_login_is_tried_on_a_new_connection_if_the_server_closes_with_its_refusal() -> None:
    async def first(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN LOGIN")
        await c.expect("AUTH PLAIN ")
        await c.say("535 5.7.8 no")
        c.close()

    async def second(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN LOGIN")
        await log_in(c)
        await c.mail()
        await c.ended()

    async with scripted(first, second) as server, pool_for(server, credentials=USER) as pool:
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2


async def test_every_mechanisms_refusal_is_shown() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH LOGIN PLAIN")
        await c.expect("AUTH PLAIN ")
        await c.say("504 5.5.4 mechanism")
        await c.expect("AUTH LOGIN")
        await c.say("535 5.7.8 wrong password")
        await c.ended()

    result = await refusal_of(script, credentials=USER)
    assert result.cause == "AUTH PLAIN: 504 5.5.4 mechanism; AUTH LOGIN: 535 5.7.8 wrong password"


async def test_no_other_mechanism_is_tried_if_one_is_set_or_the_refusal_is_transient() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH LOGIN PLAIN")
        await c.expect("AUTH PLAIN ")
        await c.say(refusal)
        await c.ended()

    refusal = "535 5.7.8 no"
    credentials = Credentials("ann", "s3cret-of-ann", "plain")
    assert (await refusal_of(script, credentials=credentials)).cause == refusal
    refusal = "454 4.7.0 temporary authentication failure"
    assert (await refusal_of(script, credentials=USER)).cause == refusal


async def test_plains_response_is_sent_again_if_the_server_asks_for_it() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN LOGIN")
        assert await c.line() == f"AUTH PLAIN {PLAIN}".encode()
        await c.say("334 ")
        assert await c.line() == PLAIN.encode()
        await c.say("235 welcome")
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, credentials=USER), Sent)


async def test_an_unfinished_exchange_is_cancelled_before_login_is_tried() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN LOGIN")
        assert await c.line() == f"AUTH PLAIN {PLAIN}".encode()
        await c.say("334 ")
        assert await c.line() == PLAIN.encode()
        await c.say("334 ")
        assert await c.line() == b"*"
        await c.say("501 5.7.0 cancelled")
        await log_in(c)
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, credentials=USER), Sent)


class OneToken:
    """Returns the tokens one after the other, and remembers the refused ones."""

    def __init__(self, *tokens: str) -> None:
        self.left = list(tokens)
        self.forgotten: list[str] = []

    async def get(self) -> str:
        if not self.left:
            raise TokenError("401 invalid_client")
        return self.left[0]

    def forget(self, token: str) -> None:
        self.forgotten.append(token)
        self.left.pop(0)


async def test_a_refused_token_is_fetched_anew_and_its_trouble_is_the_relays() -> None:
    async def refuses(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH XOAUTH2")
        await c.expect("AUTH XOAUTH2 ")
        await c.say("535 5.7.8 token expired")
        await c.ended()

    async def takes(c: Conversation) -> None:
        await c.greet("PIPELINING", "auth Xoauth2")
        assert (
            await c.line()
            == f"AUTH XOAUTH2 {encoded('user=ann' + chr(1) + 'auth=Bearer new' + chr(1) * 2)}".encode()
        )
        await c.say("235 welcome")
        await c.mail()
        c.close()

    async def unused(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH XOAUTH2")
        await c.ended()

    tokens = OneToken("old", "new")
    credentials = Credentials("ann", "", "xoauth2", tokens)
    async with scripted(refuses, takes, unused) as server, pool_for(server, credentials=credentials) as pool:
        assert isinstance(await send(pool), NotSent)
        await asyncio.wait_for(pool.wait_available(), 20)
        assert isinstance(await send(pool), Sent)
        assert tokens.forgotten == ["old"]
        tokens.left.clear()
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert (result.phase, result.spares_attempt) == (Phase.AUTH, True)
        assert result.cause == "OAuth token: 401 invalid_client"


# --- TLS


async def test_starttls_then_greets_again_and_forgets(certificates: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS", "SIZE 1")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        await c.start_tls(certificates.server())
        await c.expect("EHLO ")
        await c.say("250-scripted", "250-PIPELINING", "250 AUTH PLAIN")
        await c.expect("AUTH PLAIN ")
        await c.say("235 welcome")
        await c.mail()
        await c.ended()

    result = await result_of(script, tls=Tls.STARTTLS, context=certificates.client(), credentials=USER)
    assert isinstance(result, Sent)


async def test_implicit_tls(certificates: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.mail()
        await c.ended()

    async with (
        scripted(script, tls=certificates.server()) as server,
        pool_for(server, tls=Tls.IMPLICIT, context=certificates.client()) as pool,
    ):
        assert isinstance(await send(pool), Sent)


async def test_a_large_message_over_tls(certificates: Certificates) -> None:
    message = b"Subject: big\r\n\r\n" + b"line of text\r\n" * 400_000

    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        assert await c.mail() == message
        await c.mail()
        await c.ended()

    async with (
        scripted(script, tls=certificates.server()) as server,
        pool_for(server, tls=Tls.IMPLICIT, context=certificates.client()) as pool,
    ):
        assert isinstance(await send(pool, message), Sent)
        assert isinstance(await send(pool), Sent)


async def test_lost_inside_the_message_over_tls_is_in_doubt(certificates: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        assert await c.line()
        c.reset()

    async with (
        scripted(script, tls=certificates.server()) as server,
        pool_for(server, tls=Tls.IMPLICIT, context=certificates.client()) as pool,
    ):
        result = await send(pool, b"Subject: huge\r\n\r\n" + (b"y" * 98 + b"\r\n") * 400_000)
        # The TLS layer takes all at once and does not report what has left.
        assert isinstance(result, InDoubt)


async def test_lost_after_the_dot_over_tls_is_in_doubt(certificates: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING")
        await c.envelope()
        await c.message()
        c.reset()

    async with (
        scripted(script, tls=certificates.server()) as server,
        pool_for(server, tls=Tls.IMPLICIT, context=certificates.client()) as pool,
    ):
        assert isinstance(await send(pool), InDoubt)


@pytest.mark.parametrize("tls", [Tls.STARTTLS, Tls.IMPLICIT])
@pytest.mark.parametrize("wrong", ["authority", "name"])
async def test_a_certificate_that_is_not_valid(
    tls: Tls, wrong: str, certificates: Certificates, other_name: Certificates
) -> None:
    shown = certificates if wrong == "authority" else other_name
    trusted = ssl.create_default_context() if wrong == "authority" else other_name.client()

    async def script(c: Conversation) -> None:
        if tls is Tls.STARTTLS:
            await c.greet("STARTTLS")
            await c.expect("STARTTLS")
            await c.say("220 go on")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await c.start_tls(shown.server())

    async with (
        scripted(script, tls=shown.server() if tls is Tls.IMPLICIT else None) as server,
        pool_for(server, tls=tls, context=trusted) as pool,
    ):
        result = await send(pool)
        assert isinstance(result, NotSent)
        assert (result.phase, result.spares_attempt) == (Phase.TLS, True)
        assert "certificate" in result.cause.lower()


async def test_required_tls_that_is_not_offered() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", "AUTH PLAIN")
        await c.ended()

    assert (await refusal_of(script, tls=Tls.STARTTLS, credentials=USER)).phase is Phase.TLS


async def test_required_tls_that_is_refused() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS")
        await c.expect("STARTTLS")
        await c.say("454 4.7.0 TLS not available")
        await c.ended()

    result = await refusal_of(script, tls=Tls.STARTTLS)
    assert (result.phase, result.cause) == (Phase.TLS, "454 4.7.0 TLS not available")


async def test_opportunistic_gives_no_credentials_to_an_unverified_peer(
    other_name: Certificates,
) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS", "AUTH PLAIN")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await c.start_tls(other_name.server())

    result = await refusal_of(script, tls=Tls.OPPORTUNISTIC, credentials=USER)
    assert result.phase is Phase.TLS
    assert "certificate" in result.cause.lower()


async def test_opportunistic_gives_no_credentials_in_clear() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("AUTH PLAIN")
        await c.ended()

    result = await refusal_of(script, tls=Tls.OPPORTUNISTIC, credentials=USER)
    assert result.phase is Phase.AUTH


@pytest.mark.parametrize("tls", [Tls.STARTTLS, Tls.OPPORTUNISTIC])
@pytest.mark.parametrize("injected", ["250 injected", "250-inj"])
async def test_replies_injected_before_tls_end_the_session(tls: Tls, injected: str) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS")
        await c.expect("STARTTLS")
        await c.raw(f"220 go on\r\n{injected}\r\n".encode())
        await c.ended()

    assert (await refusal_of(script, tls=tls)).phase is Phase.TLS


async def test_a_server_that_hangs_in_the_handshake() -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        await c.drained()

    result = await refusal_of(script, tls=Tls.STARTTLS, timeouts=Timeouts(tls=0.3, quit=1))
    assert result.phase is Phase.TLS


async def test_opportunistic_takes_any_certificate(other_name: Certificates) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("STARTTLS")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        await c.start_tls(other_name.server())
        await c.expect("EHLO ")
        await c.say("250-scripted", "250 PIPELINING")
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, tls=Tls.OPPORTUNISTIC), Sent)


@pytest.mark.parametrize("offered", [True, False])
async def test_opportunistic_goes_on_in_clear(offered: bool) -> None:
    async def script(c: Conversation) -> None:
        await c.greet("PIPELINING", *(["STARTTLS"] if offered else []))
        if offered:
            await c.expect("STARTTLS")
            await c.say("454 4.7.0 not now")
        await c.mail()
        await c.ended()

    assert isinstance(await result_of(script, tls=Tls.OPPORTUNISTIC), Sent)


async def test_opportunistic_reconnects_in_clear_after_a_failed_handshake() -> None:
    async def broken(c: Conversation) -> None:
        await c.greet("STARTTLS")
        await c.expect("STARTTLS")
        await c.say("220 go on")
        await c.something()
        await c.raw(b"this is no handshake\r\n" * 20)
        await c.drained()

    async def clear(c: Conversation) -> None:
        await c.greet("PIPELINING", "STARTTLS")
        await c.mail()
        await c.ended()

    async with scripted(broken, clear) as server, pool_for(server, tls=Tls.OPPORTUNISTIC) as pool:
        assert isinstance(await send(pool), Sent)
        assert server.connections == 2


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    assert "s3cret" not in f"{USER!r} {USER} {Relay('h', 25, credentials=USER)!r}"
