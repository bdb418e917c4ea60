"""Opening a session with a relay: connection, banner, EHLO, TLS, AUTH."""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping

from services.sender.oauth import TokenError
from services.sender.replies import Phase, Reply
from services.sender.smtp_addresses import Address, Addresses, ConnectError
from services.sender.smtp_auth import (
    Exchange,
    UnsupportedAuthError,
    exchange,
    hidden,
    mechanisms,
    reason,
    secret_may_go,
)
from services.sender.smtp_relay import Relay, Timeouts, Tls
from services.sender.smtp_session import Learnt, Session, UnavailableError
from services.sender.smtp_wire import Wire

__all__ = ["open_session"]

# RFC 4954 section 4: it ends an exchange that has come to nothing.
_CANCEL = b"*\r\n"


async def open_session(
    relay: Relay,
    context: ssl.SSLContext | None,
    timeouts: Timeouts,
    learnt: Learnt | None = None,
    *,
    refused: Mapping[str, str] | None = None,
) -> Session:
    """Open a session with ``relay``: with the first of its addresses that answers (RFC 8305).

    Args:
        context: for every TLS mode but ``none``.
        learnt: what earlier sessions have shown; this one adds to it.
        refused: mechanisms that are not tried again, and what was said to them.

    Raises:
        UnavailableError: the relay cannot be reached, refuses us, or offers less than ``relay`` asks for.
        asyncio.CancelledError: and nothing is left open.
    """
    learnt = learnt or Learnt()
    implicit = context if relay.tls is Tls.IMPLICIT else None
    wire, name, address = await _connect(relay, implicit, timeouts, learnt.addresses)
    session = Session(wire, name, timeouts)
    try:
        await _greet(session, relay)
        encrypted = relay.tls is Tls.IMPLICIT
        if context is not None and relay.tls in (Tls.STARTTLS, Tls.OPPORTUNISTIC):
            encrypted = await _start_tls(session, relay, context)
        if relay.credentials is not None:
            await _authenticate(session, relay, context if encrypted else None, learnt, dict(refused or {}))
        if wire.lost is not None:
            raise UnavailableError.at(Phase.CONNECT, wire.lost, name)
    except _HandshakeError as error:
        # Credentials would not go in clear either, and the certificate's trouble is what to show.
        if relay.tls is Tls.OPPORTUNISTIC and relay.credentials is None:
            return await open_session(relay, None, timeouts, learnt)
        learnt.addresses.mark(address)
        raise UnavailableError.at(Phase.TLS, str(error), name) from error
    except _ClosedAtAuthError as error:
        # A further mechanism is left to try, and the server closed with its refusal of this one.
        return await open_session(relay, context, timeouts, learnt, refused=error.refused)
    except BaseException as error:
        wire.abort("session not opened")
        if isinstance(error, UnavailableError) and error.outcome.phase in (Phase.CONNECT, Phase.TLS):
            # Another address may be better off.
            learnt.addresses.mark(address)
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
) -> tuple[Wire, str, Address]:
    where = f"{relay.host}:{relay.port}"
    try:
        async with asyncio.timeout(timeouts.connect):
            left = await addresses.resolve(relay.host, relay.port)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise UnavailableError.at(
            Phase.CONNECT, f"name lookup: {str(error) or 'timed out'}", where
        ) from error
    refused: UnavailableError | None = None
    while left or refused is None:
        try:
            address, sock = await addresses.connect(left, timeouts.connect)
        except ConnectError as error:
            name = _name(relay, left[0]) if len(left) == 1 else where
            raise refused or UnavailableError.at(Phase.CONNECT, str(error), name) from error
        name = _name(relay, address)
        try:
            return await _wire(relay, sock, implicit, timeouts), name, address
        except OSError as error:
            addresses.mark(address)
            left.remove(address)
            refused = UnavailableError.at(Phase.TLS, f"TLS handshake: {error}", name)
    raise refused


async def _wire(
    relay: Relay, sock: socket.socket, implicit: ssl.SSLContext | None, timeouts: Timeouts
) -> Wire:
    loop = asyncio.get_running_loop()
    try:
        _, wire = await loop.create_connection(
            Wire,
            sock=sock,
            ssl=implicit,
            server_hostname=relay.host if implicit else None,
            ssl_handshake_timeout=timeouts.tls if implicit else None,
        )
    except BaseException:
        sock.close()
        raise
    return wire


def _name(relay: Relay, address: Address) -> str:
    """How the relay is shown: with its address, where its host is a name."""
    shown = relay.host if address.ip == relay.host else f"{relay.host}[{address.ip}]"
    return f"{shown}:{relay.port}"


async def _greet(session: Session, relay: Relay) -> None:
    banner = await session.wire.greeting(session.timeouts.opening)
    if not banner or not banner[0].ok:
        raise _refused(session, Phase.CONNECT, banner, "banner")
    await _hello(session, relay)


async def _hello(session: Session, relay: Relay) -> None:
    name = relay.client_name or _literal(session.wire)
    answer = await session.wire.ask(f"EHLO {name}\r\n".encode(), 1, session.timeouts.opening)
    if answer and answer[0].ok:
        session.learn(answer[0])
        return
    if answer and answer[0].permanent:
        refused = answer
        answer = await session.wire.ask(f"HELO {name}\r\n".encode(), 1, session.timeouts.opening)
        if answer and answer[0].ok:
            session.learn(Reply(250, ("",)))
            return
        answer = answer or refused
    raise _refused(session, Phase.CONNECT, answer, "EHLO")


async def _start_tls(session: Session, relay: Relay, context: ssl.SSLContext) -> bool:
    """Encrypt the session and greet again; False if it stays in clear, which only ``opportunistic``
    allows."""
    required = relay.tls is Tls.STARTTLS
    if "STARTTLS" not in session.extensions:
        if required:
            raise UnavailableError.at(Phase.TLS, "the relay does not offer STARTTLS", session.name)
        return False
    answer = await session.wire.ask(b"STARTTLS\r\n", 1, session.timeouts.opening)
    if session.wire.lost is not None or not answer[0].ok:
        if required or session.wire.lost is not None:
            raise _refused(session, Phase.TLS, answer, "STARTTLS")
        return False
    try:
        await session.wire.start_tls(context, relay.host, session.timeouts.tls)
    except OSError as error:
        raise _HandshakeError(f"TLS handshake: {error}") from error
    await _hello(session, relay)
    return True


async def _authenticate(
    session: Session,
    relay: Relay,
    context: ssl.SSLContext | None,
    learnt: Learnt,
    refused: dict[str, str],
) -> None:
    """Try the mechanisms that both sides know, one after the other, until one is taken."""
    credentials, wire = relay.credentials, session.wire
    assert credentials is not None
    if not secret_may_go(relay.tls, context):
        cause = "credentials go only to a relay whose certificate is verified, unless TLS is switched off"
        raise UnavailableError.at(Phase.AUTH, cause, session.name)
    try:
        names = mechanisms(credentials, session.auth)
        secret = await credentials.tokens.get() if credentials.tokens is not None else credentials.secret
    except (UnsupportedAuthError, TokenError) as error:
        cause = f"OAuth token: {error}" if isinstance(error, TokenError) else str(error)
        raise UnavailableError.at(Phase.AUTH, cause, session.name) from error
    wire.mask = hidden(credentials.user, secret)
    left = sorted((name for name in names if name not in refused), key=lambda name: name != learnt.mechanism)
    for name in left:
        answer, reasons = await _exchange(session, exchange(name, credentials.user, secret))
        if wire.lost is None and answer[0].ok:
            learnt.mechanism = name
            return
        if not answer and name != left[0]:
            # The server closed with its refusal of the one before.
            raise _ClosedAtAuthError(refused)
        refused[name] = " ".join([_refused(session, Phase.AUTH, answer, "AUTH").outcome.cause, *reasons])
        if not answer or not answer[0].permanent:
            break
        if credentials.tokens is not None:
            credentials.tokens.forget(secret)
    told = len(set(refused.values())) > 1
    causes = (
        [f"AUTH {name}: {said}" for name, said in refused.items()] if told else list(refused.values())[:1]
    )
    raise UnavailableError.at(Phase.AUTH, "; ".join(causes), session.name)


async def _exchange(session: Session, lines: Exchange) -> tuple[list[Reply], list[str]]:
    """Send a mechanism's lines; return the last answer, and what the ones before said in the clear."""
    line = next(lines)
    reasons: list[str] = []
    while True:
        answer = await session.wire.ask(line, 1, session.timeouts.opening)
        if not answer or not answer[0].intermediate or line == _CANCEL:
            return answer, [said for said in reasons if said.startswith("{")]
        reasons.append(reason(answer[0], session.wire.mask))
        try:
            line = lines.send(answer[0])
        except StopIteration:
            line = _CANCEL


def _refused(session: Session, phase: Phase, answer: list[Reply], to: str) -> UnavailableError:
    said = str(answer[0]) if answer else f"no answer to {to}"
    cause = said if answer and not answer[0].ok else f"{said}: {session.wire.lost}"
    return UnavailableError.at(phase, cause, session.name)


def _literal(wire: Wire) -> str:
    ip = ipaddress.ip_address(wire.transport.get_extra_info("sockname")[0].partition("%")[0])
    return f"[IPv6:{ip}]" if ip.version == 6 else f"[{ip}]"
