"""The sender's SMTP client: a pool of sessions with one relay.

>>> pool = SmtpPool(Relay("mail.example.org", 587, credentials=Credentials("user", "secret")))
>>> outcome = await pool.send("shop@example.org", "ann@example.net", message, lambda: lease.holds)

The pool is *down* while the relay cannot be reached, or refuses all mails of the account. Every send then
returns ``NotSent`` with ``spares_attempt`` at once.

- While no session comes about, the pool tries to open one, with growing pauses. ``wait_available`` returns
  when it has one.
- While the relay refuses the account, only a mail can show whether that is over. ``wait_available`` then
  lets one waiter go after each pause, and the pool sends its mail as a probe.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from services.sender.replies import OPENING, InDoubt, NotSent, Rejected, SendResult, Sent, TransactionStep
from services.sender.smtp_relay import Credentials, Limits, Relay, Timeouts, Tls
from services.sender.smtp_session import Session, UnavailableError
from services.sender.smtp_sessions import Sessions, backoff_seconds
from services.sender.smtp_transaction import StaleSessionError, begin, check_mail, hand_over

__all__ = [
    "Credentials",
    "Limits",
    "PoolClosedError",
    "PoolState",
    "Relay",
    "SendCancelled",
    "SmtpPool",
    "Timeouts",
    "Tls",
]

_log = structlog.get_logger()

# This many new sessions in a row without a reply to MAIL show that the relay is at fault.
_UNANSWERED = 3


class SendCancelled(asyncio.CancelledError):
    """A cancelled ``send`` raises this CancelledError, which says whether the mail was being handed over.

    ``rest`` is None if nothing of the message was sent. Otherwise the send goes on in the task ``rest``,
    whose result is the send's; cancelling the task cuts the send off. A caller that catches this must raise
    it again.
    """

    def __init__(self, rest: asyncio.Task[SendResult] | None = None) -> None:
        super().__init__()
        self.rest = rest


class PoolClosedError(Exception):
    """The pool was closed: its relay will not become available again."""


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
        self._limits = limits or Limits()
        self._sessions = Sessions(relay, self._limits, timeouts or Timeouts())
        self._trouble: NotSent | None = None
        self._last_trouble: NotSent | None = None
        self._failures = 0
        self._unanswered = 0
        self._on_trouble = on_trouble
        self._waiting: dict[asyncio.Future[None], None] = {}
        # Whether one mail may be sent as a probe while the pool is down, and whether no waiter was woken
        # for it.
        self._probe = False
        self._probe_pending = False
        self._recovery: asyncio.Task[None] | None = None
        self._closing = False

    async def send(self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]) -> SendResult:
        """Send one mail to one recipient; wait for a free session if there is none.

        Args:
            mail_from: the return path; empty for the null path (RFC 5321 §4.5.5).
            message: with CRLF line ends, not dot-stuffed.
            guard: called before the envelope and again before the message is written; False ends the send.

        Returns:
            ``Sent``: the server took the mail. ``Rejected``: it refused this mail. ``NotSent``: it
            certainly does not have the mail. ``InDoubt``: the mail was handed over, and no reply came.
            ``LeaseLost``: the guard returned False.

        Raises:
            ValueError: the addresses or the message cannot be sent as they are; nothing was sent.
            SendCancelled: the caller's task was cancelled. Until the server asks for the message, that aborts
                the session. From then on the send goes on without the caller.
        """
        check_mail(mail_from, rcpt, message)
        if self._trouble is not None and not self._probe:
            return self._trouble
        probe, self._probe = self._probe, False
        again = False
        while True:
            outcome = await self._send(mail_from, rcpt, message, guard, probe=probe, fresh=again)
            if again or not (isinstance(outcome, Rejected) and outcome.about_session):
                return outcome
            _log.debug("session_refused", relay=outcome.relay, phase=outcome.phase, reply=outcome.reply)
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
    ) -> SendResult:
        session: Session | None = None
        try:
            while True:
                session = await self._sessions.acquire(fresh=fresh)
                if session.fresh and self._trouble is not None and self._trouble.phase in OPENING:
                    self._mark_up()
                try:
                    outcome = await begin(session, mail_from, rcpt, message, guard)
                except StaleSessionError:
                    session = None
                    continue
                break
        except UnavailableError as error:
            self._mark_down(error.outcome)
            return error.outcome
        except asyncio.CancelledError:
            if session is not None:
                session.connection.abort("cancelled")
            raise SendCancelled from None
        except BaseException:
            if session is not None:
                session.connection.abort("internal error")
            raise
        if outcome is not None:
            return self._finish_send(session, outcome, probe)
        rest = asyncio.get_running_loop().create_task(
            self._hand_over(session, mail_from, message, guard, probe)
        )
        try:
            return await asyncio.shield(rest)
        except asyncio.CancelledError:
            raise SendCancelled(rest) from None

    @property
    def available(self) -> bool:
        """False while the pool is down or closed."""
        return self._trouble is None and not self._closing

    async def wait_available(self) -> None:
        """Wait, without a limit, until the pool is up or may send the caller's mail as a probe.

        Raises:
            PoolClosedError: the pool is closed, or is closed meanwhile.
        """
        if self._trouble is not None and not self._closing and not self._probe_pending:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[waiter] = None
            try:
                await waiter
            finally:
                self._waiting.pop(waiter, None)
        if self._closing:
            raise PoolClosedError
        self._probe_pending = False

    @property
    def state(self) -> PoolState:
        return PoolState(
            available=self.available,
            busy=len(self._sessions) - self._sessions.idle,
            idle=self._sessions.idle,
            opening=self._sessions.opening,
            waiting=self._sessions.waiting,
            opened=self._sessions.opened,
            trouble=self._trouble,
        )

    async def close(self, grace: float = 10.0) -> None:
        """Refuse new sends, give those under way ``grace`` seconds to end, and QUIT all sessions.

        The pool then aborts what is still under way: those sends return ``NotSent`` or ``InDoubt``.
        """
        self._closing = True
        self._wake(len(self._waiting))
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._sessions.close(grace)

    def _mark_down(self, trouble: NotSent) -> None:
        """Take the pool down until a session comes about, or until the relay takes a probe."""
        # Waiting sends report the same trouble a turn of the loop later, when it may be over.
        if self._closing or trouble is self._last_trouble:
            return
        new = self._trouble is None
        self._last_trouble = trouble
        self._set_trouble(trouble)
        if not new:
            return
        self._failures += 1
        _log.warning("relay_down", relay=trouble.relay, phase=trouble.phase, cause=trouble.cause)
        self._sessions.fail_waiters(UnavailableError(trouble))
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    def _mark_up(self) -> None:
        if self._trouble is not None:
            self._probe = self._probe_pending = False
            self._set_trouble(None)
            self._wake(len(self._waiting))
            _log.info("relay_up", relay=self.relay.name)

    def _set_trouble(self, trouble: NotSent | None) -> None:
        self._trouble = trouble
        self._on_trouble(trouble)

    def _wake(self, count: int) -> int:
        """Wake the first ``count`` waiters of ``wait_available``; return how many there were."""
        woken = [waiter for waiter in self._waiting if not waiter.done()][:count]
        for waiter in woken:
            waiter.set_result(None)
        return len(woken)

    async def _recover(self) -> None:
        while self._trouble is not None:
            await asyncio.sleep(backoff_seconds(self._limits, self._failures))
            if self._trouble is None:
                return
            if self._trouble.phase not in OPENING:
                # Sessions come about, but the relay refuses all mails: only another mail shows whether that
                # is over.
                self._failures += 1
                self._probe = True
                self._probe_pending = not self._wake(1)
                continue
            try:
                self._sessions.release(await self._sessions.open())
                self._mark_up()
            except UnavailableError as error:
                # A send may have brought the pool up meanwhile.
                if self._trouble is not None:
                    self._failures += 1
                    self._set_trouble(error.outcome)
            except Exception:
                # Nothing else would bring the pool up again.
                self._failures += 1
                _log.exception("relay_check_failed", relay=self.relay.name)

    async def _hand_over(
        self, session: Session, mail_from: str, message: bytes, guard: Callable[[], bool], probe: bool
    ) -> SendResult:
        try:
            outcome = await hand_over(session, mail_from, message, guard)
        except BaseException:
            session.connection.abort("internal error")
            raise
        return self._finish_send(session, outcome, probe)

    def _finish_send(self, session: Session, outcome: SendResult, probe: bool) -> SendResult:
        outcome = self._count_unanswered(session, outcome)
        if isinstance(outcome, NotSent) and outcome.spares_attempt:
            self._mark_down(outcome)
        elif isinstance(outcome, Rejected) and outcome.about_session:
            self._sessions.end(session)
        elif (probe or self._trouble is None) and self._proves_recovery(outcome):
            self._failures = 0
            self._mark_up()
        self._sessions.release(session)
        return outcome

    def _count_unanswered(self, session: Session, outcome: SendResult) -> SendResult:
        """Return the result, with ``spares_attempt`` if MAIL got no reply in several new sessions in a row.

        MAIL names no recipient, so the relay is at fault. A single such session may be due to the network.
        """
        if (
            isinstance(outcome, NotSent)
            and outcome.step is TransactionStep.MAIL
            and not outcome.spares_attempt
        ):
            # With pipelining all commands go at once, so the silence may concern the recipient.
            silent = session.connection.timed_out and "PIPELINING" in session.extensions
            if session.fresh and not silent:
                self._unanswered += 1
                if self._unanswered >= _UNANSWERED:
                    return replace(outcome, spares_attempt=True)
        elif isinstance(outcome, Sent | InDoubt) or getattr(outcome, "step", None) is not None:
            self._unanswered = 0
        return outcome

    def _proves_recovery(self, outcome: SendResult) -> bool:
        """Return whether the relay took the mail, or refused it no earlier than the trouble's step."""
        if not isinstance(outcome, Rejected):
            return isinstance(outcome, Sent)
        refused = self._trouble.step if self._trouble is not None else None
        return outcome.step is not None and (refused is None or outcome.step.reaches(refused))
