"""The settings of one relay: its address, TLS and credentials, timeouts and limits."""

import ssl
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

__all__ = ["Credentials", "Limits", "Relay", "Timeouts", "Tls", "Tokens"]


class Tls(StrEnum):
    """When a session is encrypted."""

    IMPLICIT = "implicit"
    """From the first byte (RFC 8314, port 465)."""
    STARTTLS = "starttls"
    """By STARTTLS (RFC 3207), with a verified certificate; otherwise there is no session."""
    OPPORTUNISTIC = "opportunistic"
    """By STARTTLS if the server offers it and it works, without verifying the certificate; in clear
    otherwise.

    With credentials the certificate is verified, and no session is in clear."""
    NONE = "none"
    """Never."""


class Tokens(Protocol):
    """The source of access tokens; `OAuthTokens` says what each method does."""

    async def get(self) -> str: ...

    def forget(self, token: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who to be for AUTH (RFC 4954)."""

    user: str
    secret: str = field(repr=False)
    mechanism: str | None = None
    """PLAIN, LOGIN or XOAUTH2, in any case; None: PLAIN, then LOGIN, if the server offers them."""
    tokens: Tokens | None = field(default=None, repr=False)
    """For XOAUTH2: the source of the secret, an access token, at each session."""


@dataclass(frozen=True, slots=True)
class Relay:
    """The mail server to which the sender gives all mails."""

    host: str
    port: int
    tls: Tls = Tls.STARTTLS
    credentials: Credentials | None = None
    client_name: str | None = None
    """The client's name in EHLO; None: the address literal of the connection (RFC 5321 §4.1.3)."""
    context: ssl.SSLContext | None = None
    """For another certificate authority or a client certificate; None: the system's authorities."""

    @property
    def name(self) -> str:
        """The relay's name in logs: ``mail.example.org:25``."""
        return f"{self.host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext:
        """Return the context for this relay's sessions. Reads the system's authorities from disk."""
        if self.context is not None:
            return self.context
        context = ssl.create_default_context()
        if self.tls is Tls.OPPORTUNISTIC and self.credentials is None:
            # RFC 7435: some protection is better than none; after a refusal here the mail would go in clear.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait in each phase. From `command` on the defaults are the minimums of RFC 5321 §4.5.3.2."""

    connect: float = 30.0
    """To resolve the relay's name, and to connect to each of its addresses."""
    tls: float = 30.0
    opening: float = 30.0
    """For each reply until the session is open: the greeting, EHLO, STARTTLS, AUTH.

    RFC 5321 recommends five minutes. But a relay that accepts connections and stays silent would occupy all
    of a sender's sessions for as long, and a session that fails to open costs no attempt."""
    command: float = 300.0
    """MAIL, RCPT, RSET."""
    data: float = 120.0
    """For the 354 after DATA."""
    block: float = 180.0
    """For the message to leave the client's buffers, plus a second for every 10,000 bytes."""
    after_dot: float = 600.0
    quit: float = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How many sessions the pool opens, and how it uses them."""

    sessions: int = 20
    per_domain: int = 0
    """How many sessions one recipient domain may use where the relay takes fewer than `sessions`; 0: any.

    At or above what the relay takes, it is three quarters of that."""
    mails_per_session: int = 500
    idle: float = 30.0
    """Seconds after which the pool closes an unused session, well before servers do (300 s)."""
    backoff: float = 0.5
    """Seconds before the first try to reach a relay that failed; doubled with each further try, with
    jitter."""
    backoff_max: float = 30.0
