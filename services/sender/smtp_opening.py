"""Opening a session with a relay: connection, banner, EHLO, TLS, AUTH."""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping

from services.sender.oauth import TokenError
from services.sender.replies import Phase, Reply
from services.sender.smtp_addresses import Addresses, ConnectError, RelayAddress
from services.sender.smtp_auth import (
    Exchange,
    UnsupportedAuthError,
    challenge_text,
    exchange,
    may_send_secret,
    mechanisms,
    secret_mask,
)
from services.sender.smtp_connection import SmtpConnection
from services.sender.smtp_relay import Relay, Timeouts, Tls
from services.sender.smtp_session import RelayMemory, Session, UnavailableError

__all__ = ["open_session"]

# RFC 4954 section 4: it cancels an exchange.
_CANCEL = b"*\r\n"


async def open_session(
    relay: Relay,
    context: ssl.SSLContext | None,
    timeouts: Timeouts,
    memory: RelayMemory | None = None,
    *,
    refused: Mapping[str, str] | None = None,
) -> Session:
    """Open a session with the first of the relay's addresses that answers (RFC 8305).

    Args:
        context: for every TLS mode but ``none``.
        memory: what earlier sessions have shown; this one adds to it.
        refused: the mechanisms that the relay refused, which are not tried again, and its replies.

    Raises:
        UnavailableError: the relay cannot be reached, refuses the session, or lacks what ``relay`` requires.
        asyncio.CancelledError: nothing is left open.
    """
    memory = memory or RelayMemory()
    implicit = context if relay.tls is Tls.IMPLICIT else None
    connection, name, address = await _connect(relay, implicit, timeouts, memory.addresses)
    session = Session(connection, name, timeouts, memory)
    try:
        await _greet(session, relay)
        encrypted = relay.tls is Tls.IMPLICIT
        if context is not None and relay.tls in (Tls.STARTTLS, Tls.OPPORTUNISTIC):
            encrypted = await _start_tls(session, relay, context)
        if relay.credentials is not None:
            await _authenticate(session, relay, context if encrypted else None, memory, dict(refused or {}))
        if connection.lost is not None:
            raise UnavailableError.during(Phase.CONNECT, connection.lost, name)
    except _HandshakeError as error:
        # With credentials a session in clear is no way out, and the certificate's error is the one to show.
        if relay.tls is Tls.OPPORTUNISTIC and relay.credentials is None:
            return await open_session(relay, None, timeouts, memory)
        memory.addresses.mark(address)
        raise UnavailableError.during(Phase.TLS, str(error), name) from error
    except _ClosedAtAuthError as error:
        # The server refused a mechanism and closed the connection, and another mechanism is left.
        return await open_session(relay, context, timeouts, memory, refused=error.refused)
    except BaseException as error:
        connection.abort("session not opened")
        if isinstance(error, UnavailableError) and error.result.phase in (Phase.CONNECT, Phase.TLS):
            # Another address may work.
            memory.addresses.mark(address)
        raise
    return session


class _HandshakeError(Exception):
    pass


class _ClosedAtAuthError(Exception):
    def __init__(self, refused: dict[str, str]) -> None:
        super().__init__()
        self.refused = refused


async def _connect(
    relay: Relay, implicit: ssl.SSLContext | None, timeouts: Timeouts, addresses: Addresses
) -> tuple[SmtpConnection, str, RelayAddress]:
    where = f"{relay.host}:{relay.port}"
    try:
        async with asyncio.timeout(timeouts.connect):
            left = await addresses.resolve(relay.host, relay.port)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise UnavailableError.during(
            Phase.CONNECT, f"name lookup: {str(error) or 'timed out'}", where
        ) from error
    refused: UnavailableError | None = None
    while left or refused is None:
        try:
            address, sock = await addresses.connect(left, timeouts.connect)
        except ConnectError as error:
            name = _name(relay, left[0]) if len(left) == 1 else where
            raise refused or UnavailableError.during(Phase.CONNECT, str(error), name) from error
        name = _name(relay, address)
        try:
            return await _wire(relay, sock, implicit, timeouts), name, address
        except OSError as error:
            addresses.mark(address)
            left.remove(address)
            refused = UnavailableError.during(Phase.TLS, f"TLS handshake: {error}", name)
    raise refused


async def _wire(
    relay: Relay, sock: socket.socket, implicit: ssl.SSLContext | None, timeouts: Timeouts
) -> SmtpConnection:
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(
            SmtpConnection,
            sock=sock,
            ssl=implicit,
            server_hostname=relay.host if implicit else None,
            ssl_handshake_timeout=timeouts.tls if implicit else None,
        )
    except BaseException:
        sock.close()
        raise
    return connection


def _name(relay: Relay, address: RelayAddress) -> str:
    """Return the relay's name for logs, with its address if its host is a name."""
    shown = relay.host if address.ip == relay.host else f"{relay.host}[{address.ip}]"
    return f"{shown}:{relay.port}"


async def _greet(session: Session, relay: Relay) -> None:
    banner = await session.connection.greeting(session.timeouts.opening)
    if not banner or not banner[0].ok:
        raise _refused(session, Phase.CONNECT, banner, "banner")
    await _hello(session, relay)


async def _hello(session: Session, relay: Relay) -> None:
    name = relay.client_name or _literal(session.connection)
    replies = await session.connection.ask(f"EHLO {name}\r\n".encode(), session.timeouts.opening)
    if replies and replies[0].ok:
        session.learn(replies[0])
        return
    if replies and replies[0].permanent:
        refused = replies
        replies = await session.connection.ask(f"HELO {name}\r\n".encode(), session.timeouts.opening)
        if replies and replies[0].ok:
            session.learn(Reply(250, ("",)))
            return
        replies = replies or refused
    raise _refused(session, Phase.CONNECT, replies, "EHLO")


async def _start_tls(session: Session, relay: Relay, context: ssl.SSLContext) -> bool:
    """Encrypt the session and send EHLO again; return False if it stays in clear (``opportunistic`` only)."""
    required = relay.tls is Tls.STARTTLS
    if "STARTTLS" not in session.extensions:
        if required:
            raise UnavailableError.during(Phase.TLS, "the relay does not offer STARTTLS", session.name)
        return False
    replies = await session.connection.ask(b"STARTTLS\r\n", session.timeouts.opening)
    if session.connection.lost is not None or not replies[0].ok:
        if required or session.connection.lost is not None:
            raise _refused(session, Phase.TLS, replies, "STARTTLS")
        return False
    try:
        await session.connection.start_tls(context, relay.host, session.timeouts.tls)
    except OSError as error:
        raise _HandshakeError(f"TLS handshake: {error}") from error
    await _hello(session, relay)
    return True


async def _authenticate(
    session: Session,
    relay: Relay,
    context: ssl.SSLContext | None,
    memory: RelayMemory,
    refused: dict[str, str],
) -> None:
    """Try the mechanisms that both sides support, one after the other, until the relay accepts one."""
    credentials, connection = relay.credentials, session.connection
    assert credentials is not None
    if not may_send_secret(relay.tls, context):
        cause = "credentials go only to a relay whose certificate is verified, unless TLS is switched off"
        raise UnavailableError.during(Phase.AUTH, cause, session.name)
    try:
        names = mechanisms(credentials, session.auth)
        secret = await credentials.tokens.get() if credentials.tokens is not None else credentials.secret
    except (UnsupportedAuthError, TokenError) as error:
        cause = f"OAuth token: {error}" if isinstance(error, TokenError) else str(error)
        raise UnavailableError.during(Phase.AUTH, cause, session.name) from error
    connection.mask = secret_mask(credentials.user, secret)
    left = sorted((name for name in names if name not in refused), key=lambda name: name != memory.mechanism)
    for name in left:
        replies, reasons = await _exchange(session, exchange(name, credentials.user, secret))
        if connection.lost is None and replies[0].ok:
            memory.mechanism = name
            return
        if not replies and name != left[0]:
            # The server refused the mechanism before and closed the connection.
            raise _ClosedAtAuthError(refused)
        refused[name] = " ".join([_refused(session, Phase.AUTH, replies, "AUTH").result.cause, *reasons])
        if not replies or not replies[0].permanent:
            break
        if credentials.tokens is not None:
            credentials.tokens.forget(secret)
    differ = len(set(refused.values())) > 1
    causes = (
        [f"AUTH {name}: {cause}" for name, cause in refused.items()] if differ else list(refused.values())[:1]
    )
    raise UnavailableError.during(Phase.AUTH, "; ".join(causes), session.name)


async def _exchange(session: Session, lines: Exchange) -> tuple[list[Reply], list[str]]:
    """Send a mechanism's lines; return the last reply, and the readable texts of those before."""
    line = next(lines)
    reasons: list[str] = []
    while True:
        replies = await session.connection.ask(line, session.timeouts.opening)
        if not replies or not replies[0].intermediate or line == _CANCEL:
            return replies, [text for text in reasons if text.startswith("{")]
        reasons.append(challenge_text(replies[0], session.connection.mask))
        try:
            line = lines.send(replies[0])
        except StopIteration:
            line = _CANCEL


def _refused(session: Session, phase: Phase, replies: list[Reply], to: str) -> UnavailableError:
    reply = str(replies[0]) if replies else f"no answer to {to}"
    cause = reply if replies and not replies[0].ok else f"{reply}: {session.connection.lost}"
    return UnavailableError.during(phase, cause, session.name)


def _literal(connection: SmtpConnection) -> str:
    ip = ipaddress.ip_address(connection.transport.get_extra_info("sockname")[0].partition("%")[0])
    return f"[IPv6:{ip}]" if ip.version == 6 else f"[{ip}]"
