"""The sender's SMTP client: a pool of sessions with one relay.

>>> pool = SmtpPool(Relay("mail.example.org", 587, credentials=Credentials("user", "secret")))
>>> result = await pool.send("shop@example.org", "ann@example.net", message, lease.holds)

The pool is *down* while the relay cannot be reached, or refuses all mails of the account. Every send then
returns ``NotSent`` with ``spares_attempt`` at once.

- While no session comes about, the pool tries to open one, with growing pauses. ``wait_available`` returns
  when it has one.
- While the relay refuses the account, only a mail can show whether that is over. ``wait_available`` then
  lets one waiter go after each pause, and the pool sends its mail as a probe.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.sender.masking import reply_codes
from services.sender.relay_availability import PoolClosedError, RelayAvailability
from services.sender.replies import NotSent, Rejected, SendResult
from services.sender.smtp_mail import OutgoingMail
from services.sender.smtp_relay import Credentials, Limits, Relay, Timeouts, Tls
from services.sender.smtp_session import Session, UnavailableError
from services.sender.smtp_sessions import Sessions
from services.sender.smtp_transaction import StaleSessionError, begin, check_mail, send_message

__all__ = [
    "Credentials",
    "Limits",
    "OutgoingMail",
    "PoolClosedError",
    "PoolState",
    "Relay",
    "SendCancelled",
    "SmtpPool",
    "Timeouts",
    "Tls",
]

_log = structlog.get_logger()


class SendCancelled(asyncio.CancelledError):
    """A cancelled ``send`` raises this CancelledError, which says whether the message was being sent.

    ``rest`` is None if nothing of the message was sent. Otherwise the send goes on in the task ``rest``,
    whose result is the send's; cancelling the task cuts the send off. A caller that catches this must raise
    it again.
    """

    def __init__(self, rest: asyncio.Task[SendResult] | None = None) -> None:
        super().__init__()
        self.rest = rest


@dataclass(slots=True)
class _Submitted:
    task: asyncio.Task[None] | None = None
    rest: asyncio.Task[SendResult] | None = None
    final: bool = False
    """Whether the mail goes on no second session."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """The pool's state at one moment, for health and metrics."""

    available: bool
    busy: int
    idle: int
    opening: int
    waiting: int
    """Sends that wait for a session."""
    opened: int
    """Sessions opened since the start."""
    trouble: NotSent | None
    """What failed last; None while the pool is not down."""


class SmtpPool:
    """Sends mail over sessions with one relay, which it keeps open and reuses. Belongs to one event loop.

    A relay may take fewer sessions than ``limits.sessions``. When it refuses another one while some work, the
    pool opens no more for a while. The pool calls ``on_trouble`` whenever the relay's trouble changes, with
    None when it is over.
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
        limits = limits or Limits()
        self._sessions = Sessions(relay, limits, timeouts or Timeouts())
        self._availability = RelayAvailability(relay.name, self._sessions, limits, on_trouble)
        self._submitted: dict[OutgoingMail, _Submitted] = {}

    def submit(self, mail: OutgoingMail) -> None:
        """Send a mail as soon as a session is free; ``mail.on_result`` gets the result. Does not block.

        Raises:
            ValueError: the addresses or the message cannot be sent as they are; nothing follows.
        """
        check_mail(mail.mail_from, mail.rcpt, mail.message)
        submitted = self._submitted[mail] = _Submitted()
        submitted.task = asyncio.get_running_loop().create_task(self._carry(mail, submitted))

    def withdraw(self, mail: OutgoingMail) -> bool:
        """Take a mail back before its message is written; abort its session if its envelope was written.

        Returns:
            True: nothing of the message was sent, nothing will be, and ``on_result`` is not called.
            False: the message is being sent or was. ``on_result`` follows, or was called. The mail goes on
            no second session.
        """
        submitted = self._submitted.get(mail)
        if submitted is None or submitted.task is None:
            return False
        if submitted.rest is not None:
            submitted.final = True
            return False
        del self._submitted[mail]
        submitted.task.cancel()
        return True

    def cut_off(self, mail: OutgoingMail) -> None:
        """Abort the session of a mail whose message is being sent or was: its result follows at once.

        A mail of which ``withdraw`` did not return False is left alone.
        """
        submitted = self._submitted.get(mail)
        if submitted is not None and submitted.rest is not None:
            submitted.final = True
            submitted.rest.cancel()

    async def _carry(self, mail: OutgoingMail, submitted: _Submitted) -> None:
        result: SendResult | None = self._availability.blocking
        probe = result is None and self._availability.take_probe()
        again = False
        while result is None:
            result = await self._send(
                mail.mail_from, mail.rcpt, mail.message, mail.guard, probe=probe, fresh=again, keep=submitted
            )
            if isinstance(result, Rejected) and result.about_session and not (again or submitted.final):
                result, submitted.rest, again = None, None, True
        if self._submitted.pop(mail, None) is not None:
            mail.on_result(result)

    async def send(self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]) -> SendResult:
        """Send one mail to one recipient; wait for a free session if there is none.

        Args:
            mail_from: the return path; empty for the null path (RFC 5321 §4.5.5).
            message: with CRLF line ends, not dot-stuffed.
            guard: called before the envelope and again before the message is written; False ends the send.

        Returns:
            ``Sent``: the server took the mail. ``Rejected``: it refused this mail. ``NotSent``: it certainly
            does not have the mail. ``InDoubt``: the mail may have been handed over, and no final reply came.
            ``LeaseLost``: the guard returned False.

        Raises:
            ValueError: the addresses or the message cannot be sent as they are; nothing was sent.
            SendCancelled: the caller's task was cancelled. Until the server asks for the message, that aborts
                the session. From then on the send goes on without the caller.
        """
        check_mail(mail_from, rcpt, message)
        if (trouble := self._availability.blocking) is not None:
            return trouble
        probe = self._availability.take_probe()
        again = False
        while True:
            result = await self._send(mail_from, rcpt, message, guard, probe=probe, fresh=again)
            if again or not (isinstance(result, Rejected) and result.about_session):
                return result
            _log.debug(
                "session_refused", relay=result.relay, phase=result.phase, reply=reply_codes(result.reply)
            )
            again = True

    async def _send(
        self,
        mail_from: str,
        rcpt: str,
        message: bytes,
        guard: Callable[[], bool],
        *,
        probe: bool,
        fresh: bool,
        keep: _Submitted | None = None,
    ) -> SendResult:
        session: Session | None = None
        try:
            while True:
                session = await self._sessions.acquire(fresh=fresh)
                if session.fresh:
                    self._availability.session_opened()
                try:
                    result = await begin(session, mail_from, rcpt, message, guard)
                except StaleSessionError:
                    session = None
                    continue
                break
        except UnavailableError as error:
            self._availability.mark_down(error.result)
            return error.result
        except asyncio.CancelledError:
            if session is not None:
                session.connection.abort("cancelled")
            raise SendCancelled from None
        except BaseException:
            if session is not None:
                session.connection.abort("internal error")
            raise
        if result is not None:
            return self._finish_send(session, result, probe)
        rest = asyncio.get_running_loop().create_task(
            self._send_message(session, mail_from, message, guard, probe)
        )
        if keep is not None:
            keep.rest = rest
        try:
            return await asyncio.shield(rest)
        except asyncio.CancelledError:
            raise SendCancelled(rest) from None

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
            opening=self._sessions.opening,
            waiting=self._sessions.waiting,
            opened=self._sessions.opened,
            trouble=self._availability.trouble,
        )

    async def close(self, grace: float = 10.0) -> None:
        """Refuse new sends, give those under way ``grace`` seconds to end, and QUIT all sessions.

        The pool then aborts what is still under way: those sends return ``NotSent`` or ``InDoubt``.
        """
        await self._availability.close()
        await self._sessions.close(grace)

    async def _send_message(
        self, session: Session, mail_from: str, message: bytes, guard: Callable[[], bool], probe: bool
    ) -> SendResult:
        try:
            result = await send_message(session, mail_from, message, guard)
        except BaseException:
            session.connection.abort("internal error")
            raise
        return self._finish_send(session, result, probe)

    def _finish_send(self, session: Session, result: SendResult, probe: bool) -> SendResult:
        result = self._availability.judge(session, result, probe)
        if isinstance(result, Rejected) and result.about_session:
            self._sessions.end(session)
        self._sessions.release(session)
        return result
