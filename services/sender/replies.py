"""The types of replies and of a send's results."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "OPENING",
    "InDoubt",
    "LeaseLost",
    "NotSent",
    "Phase",
    "Rejected",
    "Reply",
    "SendResult",
    "Sent",
    "TransactionStep",
]


class Phase(StrEnum):
    """How far a session had come when it failed, or a transaction when it ended."""

    CONNECT = "connect"
    """Connection, banner, EHLO."""
    TLS = "tls"
    AUTH = "auth"
    ENVELOPE = "envelope"
    """MAIL FROM, RCPT TO."""
    DATA = "data"
    """The DATA command and the message up to, not including, its last byte."""
    AFTER_DOT = "after_dot"
    """The mail was handed over; only a reply can tell whether the server has it."""


OPENING = frozenset({Phase.CONNECT, Phase.TLS, Phase.AUTH})
"""The phases before MAIL: a failure in them concerns the relay and no single mail."""


class TransactionStep(StrEnum):
    """What the server replies to in a mail transaction (RFC 5321 §3.3), in this order."""

    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    MESSAGE = "message"

    def reaches(self, other: "TransactionStep") -> bool:
        """Return whether this step is `other` or comes after it."""
        order = list(TransactionStep)
        return order.index(self) >= order.index(other)


class Reply(NamedTuple):
    """One reply, of one or more lines (RFC 5321 §4.2). Its first digit alone decides its kind (§4.2.1)."""

    code: int
    lines: tuple[str, ...]
    """The texts after the codes, in printable characters only, since operators see them on terminals.

    The last line's code is the reply's. Lines with another code follow the others, code included."""

    @property
    def ok(self) -> bool:
        return 200 <= self.code < 300

    @property
    def intermediate(self) -> bool:
        return 300 <= self.code < 400

    @property
    def transient(self) -> bool:
        return 400 <= self.code < 500

    @property
    def permanent(self) -> bool:
        """True for 5yz, whatever class an enhanced code has: ``550 4.2.1`` is permanent."""
        return self.code >= 500

    @property
    def closes(self) -> bool:
        """True for 421: the server is about to close the session (RFC 5321 §3.8)."""
        return self.code == 421

    @property
    def enhanced(self) -> str | None:
        """The enhanced status code (RFC 2034), ``5.1.1``, or None."""
        found = _ENHANCED.match(self.lines[0])
        return found.group(1) if found else None

    def __str__(self) -> str:
        """Return the code and all the text on one line: ``550 5.1.1 no such user``."""
        return f"{self.code} {' '.join(self.lines)}".rstrip()


_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?= |$)")


@dataclass(frozen=True, slots=True)
class Sent:
    """The server took responsibility for the mail: 2yz after the dot (RFC 5321 §6.1)."""

    reply: str
    relay: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server refused this mail or (`about_session`) the session; it certainly does not have the mail."""

    phase: Phase
    reply: str
    permanent: bool
    retry_after: float | None = None
    """Seconds that the server asked to wait (greylisting); None if it did not."""
    relay: str = ""
    about_session: bool = False
    """True if the refusal ends the session and does not concern this mail, which may go on a new one at
    once."""
    step: TransactionStep | None = None
    """What the server refused; None if its reply to EHLO showed that it would, and it was not asked."""


@dataclass(frozen=True, slots=True)
class NotSent:
    """The server said nothing about this mail itself, and certainly does not have it."""

    phase: Phase
    cause: str
    spares_attempt: bool
    """True if no session came about, or the relay refuses all mails of the account.

    The mail is not to blame, so it loses no attempt."""
    relay: str = ""
    unparsed: str = ""
    """What the server sent last, if that was no reply that could be read."""
    step: TransactionStep | None = None
    """What the server refused or did not answer; None if the session did not come so far."""


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The mail was handed over, or may have been, and no final reply came (RFC 1047)."""

    cause: str
    relay: str
    unparsed: str = ""
    """As in ``NotSent``."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The caller's guard returned False; nothing of the message was sent."""

    phase: Phase


SendResult = Sent | Rejected | NotSent | InDoubt | LeaseLost
