"""The settings of one relay: where it is, how to speak to it, how long to wait and how much to ask of it."""

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
    """By STARTTLS (RFC 3207), or there is no session. The certificate is verified."""
    OPPORTUNISTIC = "opportunistic"
    """By STARTTLS if the server offers it and it works, in clear otherwise; no certificate is verified.

    With credentials the certificate is verified, and there is no session in clear."""
    NONE = "none"
    """Never."""


class Tokens(Protocol):
    """Where access tokens come from; `OAuthTokens` says what each does."""

    async def get(self) -> str: ...

    def forget(self, token: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who to be for AUTH (RFC 4954)."""

    user: str
    secret: str = field(repr=False)
    mechanism: str | None = None
    """PLAIN, LOGIN or XOAUTH2, whatever the case; None tries PLAIN, then LOGIN, of what the server offers."""
    tokens: Tokens | None = field(default=None, repr=False)
    """For XOAUTH2: asked for the secret, an access token, at each session."""


@dataclass(frozen=True, slots=True)
class Relay:
    """A mail server that takes our mail."""

    host: str
    port: int
    tls: Tls = Tls.STARTTLS
    credentials: Credentials | None = None
    client_name: str | None = None
    """What EHLO says: our host name, or None for the address literal of the connection (RFC 5321 §4.1.3)."""
    context: ssl.SSLContext | None = None
    """For another certificate authority or a client certificate; None takes the system's authorities."""

    @property
    def name(self) -> str:
        """How it is shown: ``mail.example.org:25``."""
        return f"{self.host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext:
        """The context for this relay's sessions. Reads the system's authorities from disk: build it once."""
        if self.context is not None:
            return self.context
        context = ssl.create_default_context()
        if self.tls is Tls.OPPORTUNISTIC and self.credentials is None:
            # RFC 7435: some protection beats none, and what would be refused here would go in clear.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait in each phase. From `command` on they are RFC 5321 §4.5.3.2's minimums."""

    connect: float = 30.0
    """For the relay's name, and for each of its addresses."""
    tls: float = 30.0
    opening: float = 30.0
    """For each answer until a session stands: the greeting, EHLO, STARTTLS, AUTH. RFC 5321 would have five
    minutes; but a session that does not come about costs no attempt and is tried anew, while a relay that
    once took connections in silence would hold all of a sender's sessions for as long."""
    command: float = 300.0
    """MAIL, RCPT, RSET."""
    data: float = 120.0
    """For the 354."""
    block: float = 180.0
    """For the message to leave our buffers, besides a second for every 10,000 bytes."""
    after_dot: float = 600.0
    quit: float = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much to ask of one relay."""

    sessions: int = 20
    mails_per_session: int = 500
    idle: float = 30.0
    """Seconds after which an unused session is closed: well before servers do it (300 s)."""
    backoff: float = 0.5
    """Seconds before the first try to reach a relay that failed; doubled from try to try, with jitter."""
    backoff_max: float = 30.0
