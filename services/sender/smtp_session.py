"""A session with a relay, and what sessions teach about it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from services.sender.replies import NotSent, Phase, Reply
from services.sender.smtp_addresses import Addresses
from services.sender.smtp_connection import SmtpConnection
from services.sender.smtp_relay import Timeouts

__all__ = ["RelayMemory", "Session", "UnavailableError"]


class UnavailableError(Exception):
    """No session could be had. ``outcome`` says where it failed; it is always ours."""

    def __init__(self, outcome: NotSent) -> None:
        super().__init__(f"{outcome.relay}: {outcome.phase}: {outcome.cause}")
        self.outcome = outcome

    @classmethod
    def during(cls, phase: Phase, cause: str, relay: str) -> "UnavailableError":
        return cls(NotSent(phase, cause, True, relay))


@dataclass(slots=True)
class RelayMemory:
    """What sessions with a relay have shown, for those that are opened later."""

    addresses: Addresses = field(default_factory=Addresses)
    mechanism: str | None = None
    """The one that AUTH succeeded with: it is tried first, so that no session begins with a refusal."""


class Session:
    """A session that is ready for MAIL, and what its server can do."""

    __slots__ = (
        "auth",
        "connection",
        "extensions",
        "fresh",
        "idle_since",
        "mails",
        "name",
        "needs_reset",
        "timeouts",
    )

    def __init__(self, connection: SmtpConnection, name: str, timeouts: Timeouts) -> None:
        self.connection = connection
        self.timeouts = timeouts
        self.name = name
        """The relay as it is shown: ``mail.example.org[192.0.2.1]:25``."""
        self.extensions: dict[str, str] = {}
        """EHLO keywords in capitals, each with its parameters (RFC 5321 §4.1.1.1)."""
        self.auth: Collection[str] = ()
        self.fresh = True
        """False once it has been idle: what fails then before the envelope may be the server's idle
        timeout."""
        self.needs_reset = False
        """Whether the server may be in the middle of a transaction, so that RSET must come before MAIL."""
        self.mails = 0
        self.idle_since = 0.0

    def learn(self, ehlo: Reply) -> None:
        """Take the extensions from an EHLO reply; what was known before is forgotten (RFC 3207 §4.2)."""
        self.extensions = {}
        auth: set[str] = set()
        # The first line has the server's name; of some servers, which give none, it is a keyword already.
        for line in ehlo.lines:
            keyword, _, parameters = line.strip().partition(" ")
            # "AUTH=LOGIN" is how servers wrote it before RFC 2554.
            keyword, equals, value = keyword.upper().partition("=")
            if keyword == "AUTH":
                auth.update(f"{value} {parameters}".upper().split())
            else:
                self.extensions[keyword + equals + value] = parameters.strip()
        self.auth = auth

    @property
    def size_limit(self) -> int | None:
        """Bytes that the server takes at most (RFC 1870 §4): None if it did not say, or said 0."""
        limit = self.extensions.get("SIZE", "")
        # RFC 1870 §4 gives a size 20 digits at most.
        return int(limit) or None if limit.isascii() and limit.isdigit() and len(limit) <= 20 else None
