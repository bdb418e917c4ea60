"""The client's lines in AUTH: PLAIN (RFC 4616), LOGIN and XOAUTH2. Pure."""

import binascii
import ssl
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Generator

from services.sender.masking import Mask, printable
from services.sender.replies import Reply
from services.sender.smtp_relay import Credentials, Tls

__all__ = [
    "Exchange",
    "UnsupportedAuthError",
    "challenge_text",
    "exchange",
    "may_send_secret",
    "mechanisms",
    "secret_mask",
]

Exchange = Generator[bytes, Reply, None]
"""The lines of one mechanism; the client sends each after a 334. They hold the secret: never log them."""


class UnsupportedAuthError(Exception):
    """The server offers no mechanism for these credentials."""


def may_send_secret(tls: Tls, context: ssl.SSLContext | None) -> bool:
    """Return whether a session may carry the secret: to a verified peer, or in clear if TLS is off.

    Without this rule an attacker who strips STARTTLS from an opportunistic session, or shows another
    certificate, gets the password.

    Args:
        tls: the relay's mode.
        context: the TLS context of the session; None if it is in clear.
    """
    if context is None:
        return tls is Tls.NONE
    return context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def mechanisms(credentials: Credentials, offered: Collection[str]) -> list[str]:
    """Return the mechanisms to try, in their order.

    Args:
        offered: the mechanisms of the EHLO reply, in capitals.

    Raises:
        UnsupportedAuthError: none of them can be used.
    """
    wanted = [credentials.mechanism.upper()] if credentials.mechanism else ["PLAIN", "LOGIN"]
    usable = [name for name in wanted if name in offered and name in _EXCHANGES]
    if not offered:
        raise UnsupportedAuthError("AUTH not offered by the relay, and credentials are set")
    if not usable:
        raise UnsupportedAuthError(
            f"the relay offers AUTH {' '.join(sorted(offered))}, not {' or '.join(wanted)}"
        )
    return usable


def exchange(mechanism: str, user: str, secret: str) -> Exchange:
    """Return the lines of a mechanism. The caller cancels if the server sends a 334 after the last one."""
    return _EXCHANGES[mechanism](user, secret)


def secret_mask(user: str, secret: str) -> Mask:
    """Return a mask for the secret and for the responses that hold it."""
    return Mask(secret, (_plain_response(user, secret), _xoauth2_response(user, secret)))


def challenge_text(challenge: Reply, mask: Mask) -> str:
    """Return the readable text of a 334, such as XOAUTH2's reason for a refusal; empty if there is none."""
    try:
        text = mask(b64decode(challenge.lines[0].strip(), validate=True)).decode()
    except (binascii.Error, ValueError):
        return ""
    return printable(text)


def _plain_response(user: str, secret: str) -> bytes:
    return b64encode(f"\0{user}\0{secret}".encode())


def _xoauth2_response(user: str, secret: str) -> bytes:
    return b64encode(f"user={user}\1auth=Bearer {secret}\1\1".encode())


def _plain(user: str, secret: str) -> Exchange:
    response = _plain_response(user, secret) + b"\r\n"
    yield b"AUTH PLAIN " + response
    # Some servers ignore the initial response and ask for it.
    yield response


def _login(user: str, secret: str) -> Exchange:
    yield b"AUTH LOGIN\r\n"
    yield b64encode(user.encode()) + b"\r\n"
    yield b64encode(secret.encode()) + b"\r\n"


def _xoauth2(user: str, secret: str) -> Exchange:
    response = _xoauth2_response(user, secret) + b"\r\n"
    challenge = yield b"AUTH XOAUTH2 " + response
    if not challenge.lines[0].strip():
        yield response
    # The server refuses by a 334 with the reason; the empty line asks for the 535.
    yield b"\r\n"


_EXCHANGES: dict[str, Callable[[str, str], Exchange]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "XOAUTH2": _xoauth2,
}
