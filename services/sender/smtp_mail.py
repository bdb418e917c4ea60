"""A mail as SMTP carries it: the check of its addresses and lines, its commands, its dot-stuffed message."""

import re
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

from services.sender.replies import Phase, Rejected, SendResult
from services.sender.smtp_session import Session

if TYPE_CHECKING:
    from services.sender.smtp_transaction import Transactions

__all__ = ["MailState", "OutgoingMail", "check_mail", "commands", "stuffed"]

_ADDRESS = re.compile(r"[^\x00-\x20\x7f-\xa0<>\u2028\u2029]*")


class MailState(Enum):
    """How far a mail has come."""

    NEW = auto()
    WAITING = auto()
    """In the pool's queue."""
    ENVELOPE = auto()
    """Its envelope was written, its message was not."""
    MESSAGE = auto()
    """Its message is being written or was."""
    ENDED = auto()
    """It has its result, or was withdrawn."""


class OutgoingMail:
    """One mail to one recipient, for ``SmtpPool.submit``.

    Args:
        mail_from: the return path; empty for the null path (RFC 5321 §4.5.5).
        message: with CRLF line ends, not dot-stuffed.
        guard: the pool calls it before it writes the envelope, and again before it writes the message. False
            ends the send with ``LeaseLost``.
        on_result: the pool calls it once with the result, on its loop and never inside ``submit``. It must
            not raise and not block.
    """

    __slots__ = (
        "free_session_only",
        "guard",
        "mail_from",
        "message",
        "no_other_session",
        "on_result",
        "on_second_session",
        "probe",
        "rcpt",
        "state",
        "transactions",
    )

    def __init__(
        self,
        mail_from: str,
        rcpt: str,
        message: bytes,
        guard: Callable[[], bool],
        on_result: Callable[[SendResult], None],
    ) -> None:
        self.mail_from = mail_from
        self.rcpt = rcpt
        self.message = message
        self.guard = guard
        self.on_result = on_result
        # The pool's own, from here on.
        self.state = MailState.NEW
        self.transactions: Transactions | None = None
        """Those of the session that has the mail."""
        self.free_session_only = False
        """Whether it waits for a free session: its envelope is not written behind another mail's message."""
        self.probe = False
        self.on_second_session = False
        """Whether it goes on a second session, because the first one was refused."""
        self.no_other_session = False
        """Whether it goes on no further session."""

    @property
    def domain(self) -> str:
        """The recipient's domain."""
        return self.rcpt.rpartition("@")[2]


def check_mail(mail_from: str, rcpt: str, message: bytes) -> None:
    """Refuse a mail that would break out of its command or its message (SMTP smuggling, RFC 5321 §2.3.8).

    Raises:
        ValueError: there is no recipient, or the message has a CR or LF outside a CRLF. Or an address has a
            space, a control character or an angle bracket.
    """
    if not _ADDRESS.fullmatch(mail_from) or not _ADDRESS.fullmatch(rcpt) or not rcpt:
        raise ValueError(f"not an envelope: {mail_from!r} to {rcpt!r}")
    if not message.count(b"\r\n") == message.count(b"\n") == message.count(b"\r"):
        raise ValueError("the message has line ends that are not CRLF")


def commands(session: Session, mail: OutgoingMail) -> bytes | Rejected:
    """Return MAIL, RCPT and DATA, or the refusal if this server cannot take this mail at all."""
    mail_from, rcpt, message = mail.mail_from, mail.rcpt, mail.message
    offered = session.extensions
    parameters = ""
    if "SIZE" in offered:
        limit = session.size_limit
        if limit is not None and len(message) > limit:
            return _never(
                session, f"552 5.3.4 message of {len(message)} bytes, the relay takes {limit} at most"
            )
        parameters = f" SIZE={len(message)}"
    if not (message.isascii() and mail_from.isascii() and rcpt.isascii()):
        header = message[: message.find(b"\r\n\r\n") + 1 or None]
        if not (mail_from.isascii() and rcpt.isascii() and header.isascii()):
            if "SMTPUTF8" not in offered:
                return _never(session, "550 5.6.7 the relay does not take non-ASCII addresses (SMTPUTF8)")
            parameters += " SMTPUTF8"
        if "8BITMIME" not in offered:
            return _never(session, "554 5.6.3 the relay does not take 8-bit messages (8BITMIME)")
        parameters += " BODY=8BITMIME"
    return f"MAIL FROM:<{mail_from}>{parameters}\r\nRCPT TO:<{rcpt}>\r\nDATA\r\n".encode()


def _never(session: Session, reply: str) -> Rejected:
    return Rejected(Phase.ENVELOPE, reply, True, None, session.name)


def stuffed(message: bytes) -> tuple[bytes, bytes]:
    """Return the message for DATA: leading dots doubled (RFC 5321 §4.5.2), and what ends it with a lone dot.

    A message without such dots is returned as it is, and not copied.
    """
    stuffed = message.replace(b"\r\n.", b"\r\n..")
    if message[:1] == b".":
        stuffed = b"." + stuffed
    return stuffed, b".\r\n" if message[-2:] == b"\r\n" else b"\r\n.\r\n"
