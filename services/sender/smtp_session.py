"""A session with a relay, and what the pool remembers of earlier ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.sender.replies import NotSent, Phase, Reply
from services.sender.smtp_addresses import Addresses
from services.sender.smtp_connection import SmtpConnection
from services.sender.smtp_relay import Timeouts

if TYPE_CHECKING:
    from services.sender.smtp_transaction import Transactions

__all__ = ["RelayMemory", "Session", "UnavailableError"]


class UnavailableError(Exception):
    """No session came about. ``result`` says where it failed; it always spares the attempt."""

    def __init__(self, result: NotSent) -> None:
        super().__init__(f"{result.relay}: {result.phase}: {result.cause}")
        self.result = result

    @classmethod
    def during(cls, phase: Phase, cause: str, relay: str) -> UnavailableError:
        return cls(NotSent(phase, cause, True, relay))


@dataclass(slots=True)
class RelayMemory:
    """What earlier sessions with a relay have shown, for later ones."""

    addresses: Addresses = field(default_factory=Addresses)
    mechanism: str | None = None
    """The mechanism that AUTH succeeded with. Later sessions try it first, so that none begins with a
    refusal."""
    chains: bool = True
    """Whether commands may follow a message in one write; a server that lost them gets none anymore."""


class Session:
    """A session that is ready for MAIL, and what its server supports."""

    __slots__ = (
        "auth",
        "connection",
        "extensions",
        "fresh",
        "idle_since",
        "mails",
        "memory",
        "name",
        "needs_reset",
        "pipelining",
        "prompt",
        "size_limit",
        "timeouts",
        "transactions",
    )

    transactions: Transactions
    """Set once the session is open."""

    def __init__(
        self, connection: SmtpConnection, name: str, timeouts: Timeouts, memory: RelayMemory
    ) -> None:
        self.connection = connection
        self.timeouts = timeouts
        self.memory = memory
        self.name = name
        """The relay's name in logs: ``mail.example.org[192.0.2.1]:25``."""
        self.extensions: dict[str, str] = {}
        """EHLO keywords in capitals, with their parameters (RFC 5321 §4.1.1.1)."""
        self.auth: Collection[str] = ()
        self.fresh = True
        """False once the session was idle or has ended a mail: a failure before the envelope may then be the
        server's idle timeout."""
        self.needs_reset = False
        """Whether the server may be in a transaction, so that RSET must come before MAIL."""
        self.prompt = False
        """Whether the server answered the last message soon."""
        self.pipelining = False
        self.size_limit: int | None = None
        """The most bytes that the server takes (RFC 1870 §4); None: it gave no limit, or 0."""
        self.mails = 0
        self.idle_since = 0.0

    def learn(self, ehlo: Reply) -> None:
        """Take the extensions from an EHLO reply and forget earlier ones (RFC 3207 §4.2)."""
        self.extensions = {}
        auth: set[str] = set()
        # The first line has the server's name. Some servers give none and begin with a keyword.
        for line in ehlo.lines:
            keyword, _, parameters = line.strip().partition(" ")
            # Servers from before RFC 2554 write "AUTH=LOGIN".
            keyword, equals, value = keyword.upper().partition("=")
            if keyword == "AUTH":
                auth.update(f"{value} {parameters}".upper().split())
            else:
                self.extensions[keyword + equals + value] = parameters.strip()
        self.auth = auth
        self.pipelining = "PIPELINING" in self.extensions
        limit = self.extensions.get("SIZE", "")
        # A size has at most 20 digits (RFC 1870 §4).
        readable = limit.isascii() and limit.isdigit() and len(limit) <= 20
        self.size_limit = int(limit) or None if readable else None
