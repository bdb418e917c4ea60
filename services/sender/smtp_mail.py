"""A mail that is to be sent, with what its sender wants to know."""

from collections.abc import Callable

from services.sender.replies import SendResult

__all__ = ["OutgoingMail"]


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

    __slots__ = ("guard", "mail_from", "message", "on_result", "rcpt")

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
