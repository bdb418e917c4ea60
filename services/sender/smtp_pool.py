"""The sender's SMTP client: a pool of sessions with one relay.

>>> pool = SmtpPool(Relay("mail.example.org", 587, credentials=Credentials("user", "secret")))
>>> pool.submit(OutgoingMail("shop@example.org", "ann@example.net", message, lease.holds, on_result))

The pool is *down* while the relay cannot be reached, or refuses all mails of the account. Every mail then
gets ``NotSent`` with ``spares_attempt`` at once.

- While no session comes about, the pool tries to open one, with growing pauses. ``wait_available`` returns
  when it has one.
- While the relay refuses the account, only a mail can show whether that is over. ``wait_available`` then
  lets one waiter go after each pause, and the pool sends its mail as a probe.
"""

from collections.abc import Callable
from dataclasses import dataclass

from services.sender.relay_availability import PoolClosedError
from services.sender.replies import NotSent
from services.sender.smtp_dispatcher import Dispatcher
from services.sender.smtp_mail import OutgoingMail, check_mail
from services.sender.smtp_relay import Credentials, Limits, Relay, Timeouts, Tls

__all__ = [
    "Credentials",
    "Limits",
    "OutgoingMail",
    "PoolClosedError",
    "PoolState",
    "Relay",
    "SmtpPool",
    "Timeouts",
    "Tls",
]


@dataclass(frozen=True, slots=True)
class PoolState:
    """The pool's state at one moment, for health and metrics."""

    available: bool
    busy: int
    idle: int
    opening: int
    waiting: int
    """Mails that wait for a session."""
    opened: int
    """Sessions opened since the start."""
    trouble: NotSent | None
    """What failed last; None while the pool is not down."""


class SmtpPool:
    """Sends mail over sessions with one relay, which it keeps open and reuses. Belongs to one event loop.

    A relay may take fewer sessions than ``limits.sessions``. When it refuses another one while some work, the
    pool opens no more for a while. The pool calls ``on_trouble`` whenever the relay's trouble changes, with
    None when it is over.

    With PIPELINING (RFC 2920) and more mails than sessions, the next mail's envelope leaves in one write with
    a message. So submit somewhat more mails than there are sessions.
    """

    def __init__(
        self,
        relay: Relay,
        *,
        limits: Limits | None = None,
        timeouts: Timeouts | None = None,
        on_trouble: Callable[[NotSent | None], None] = lambda trouble: None,
    ) -> None:
        self.relay = relay
        self._dispatcher = Dispatcher(relay, limits or Limits(), timeouts or Timeouts(), on_trouble)
        self._sessions = self._dispatcher.sessions
        self._availability = self._dispatcher.availability

    def submit(self, mail: OutgoingMail) -> None:
        """Send a mail as soon as a session is free; ``mail.on_result`` gets the result. Does not block.

        The result is one of these. ``Sent``: the server took the mail. ``Rejected``: it refused this mail.
        ``NotSent``: it certainly does not have the mail. ``InDoubt``: the mail may have been handed over, and
        no final reply came. ``LeaseLost``: the guard returned False.

        Raises:
            ValueError: the addresses or the message cannot be sent as they are; nothing follows.
        """
        check_mail(mail.mail_from, mail.rcpt, mail.message)
        self._dispatcher.submit(mail)

    def withdraw(self, mail: OutgoingMail) -> bool:
        """Take a mail back before its message is written; end its session if its envelope was written.

        Returns:
            True: nothing of the message was sent, nothing will be, and ``on_result`` is not called.
            False: it is too late. ``on_result`` follows, or was called. The mail goes on no second session.
        """
        return self._dispatcher.withdraw(mail)

    def cut_off(self, mail: OutgoingMail) -> None:
        """Abort the session of a mail whose message is being sent or was: it has its result on return.

        It does nothing to a mail that waits, whose message is not written, or that has its result.
        """
        self._dispatcher.cut_off(mail)

    @property
    def available(self) -> bool:
        """False while the pool is down or closed."""
        return self._availability.trouble is None and not self._availability.closing

    async def wait_available(self) -> None:
        """Wait, without a limit, until the pool is up or may send the caller's mail as a probe.

        Raises:
            PoolClosedError: the pool is closed, or is closed meanwhile.
        """
        await self._availability.wait()

    @property
    def state(self) -> PoolState:
        return PoolState(
            available=self.available,
            busy=len(self._sessions) - self._sessions.idle,
            idle=self._sessions.idle,
            opening=len(self._sessions.openings),
            waiting=self._dispatcher.waiting,
            opened=self._sessions.opened,
            trouble=self._availability.trouble,
        )

    async def close(self, grace: float = 10.0) -> None:
        """Refuse new mails, give those under way ``grace`` seconds to end, and QUIT all sessions.

        The pool then aborts what is still under way: those mails get ``NotSent`` or ``InDoubt``.
        """
        await self._dispatcher.close(grace)
