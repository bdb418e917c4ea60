"""What a mail server's replies mean, and how the sending of one mail can end.

Pure values and rules; nothing here waits or reads a clock.
"""

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
    """How far a session had come when it failed."""

    CONNECT = "connect"
    """Connection, banner, EHLO."""
    TLS = "tls"
    AUTH = "auth"
    ENVELOPE = "envelope"
    """MAIL FROM, RCPT TO."""
    DATA = "data"
    """The DATA command and the message up to, not including, its last byte."""
    AFTER_DOT = "after_dot"
    """The last byte was handed over; only a reply can tell whether the server has the mail."""


OPENING = frozenset({Phase.CONNECT, Phase.TLS, Phase.AUTH})
"""The phases before MAIL: what fails in them is the relay's trouble, whatever was said."""


class TransactionStep(StrEnum):
    """What a server answers from MAIL on, in the order of a transaction."""

    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    MESSAGE = "message"

    def reaches(self, other: "TransactionStep") -> bool:
        """Whether a transaction that came so far came as far as `other` at least."""
        order = list(TransactionStep)
        return order.index(self) >= order.index(other)


class Reply(NamedTuple):
    """One reply, of one or more lines (RFC 5321 §4.2). The first digit alone decides what it is (§4.2.1)."""

    code: int
    lines: tuple[str, ...]
    """The texts after the codes; printable characters only, since operators see them on terminals. Lines of
    another code than the last one, which decides, stand behind the others with their codes."""

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
        """True for 5yz, whatever class an enhanced code claims (``550 4.2.1`` is permanent)."""
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
        """The code first, then all the text on one line: ``550 5.1.1 no such user``."""
        return f"{self.code} {' '.join(self.lines)}".rstrip()


_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})(?= |$)")


@dataclass(frozen=True, slots=True)
class Sent:
    """The server has taken responsibility for the mail (2yz after the dot, RFC 5321 §6.1)."""

    reply: str
    relay: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server answered no to this mail; it certainly does not have it."""

    phase: Phase
    reply: str
    permanent: bool
    retry_after: float | None = None
    """Seconds that the server asked to wait (greylisting), if it did."""
    relay: str = ""
    about_session: bool = False
    """The refusal is the session's end and says nothing about this mail: it may go at once on a new one."""
    step: TransactionStep | None = None
    """What was refused; None where the server was not asked, since its EHLO said that it would refuse."""


@dataclass(frozen=True, slots=True)
class NotSent:
    """No answer about this mail itself, and the server certainly does not have it."""

    phase: Phase
    cause: str
    spares_attempt: bool
    """True when no session could be had, or the relay refuses what the account sends: it says nothing about
    this mail, so it spends no attempt."""
    relay: str = ""
    unparsed: str = ""
    """What the server said last, if that was no answer that could be understood."""
    step: TransactionStep | None = None
    """What was refused, or not answered; None where the session did not come so far."""


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The last byte was, or may have been, handed over and no answer came (RFC 1047)."""

    cause: str
    relay: str
    unparsed: str = ""
    """As for ``NotSent``."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The caller's guard said no; nothing was sent."""

    phase: Phase


SendResult = Sent | Rejected | NotSent | InDoubt | LeaseLost
