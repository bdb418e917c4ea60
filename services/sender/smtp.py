"""The sender's SMTP client: a pool of sessions with one relay.

>>> pool = SmtpPool(Relay("mail.example.org", 587, credentials=Credentials("user", "secret")))
>>> outcome = await pool.send("shop@example.org", "ann@example.net", message, lambda: lease.holds)

While the relay cannot be reached the pool is *down*: every send returns ``NotSent(ours=True)`` at once, the
pool itself tries to get a session with growing pauses, and ``wait_available`` returns when it has one. The
same while the relay refuses what the account sends. Only a mail can tell whether that is over:
``wait_available`` then lets one waiter go after each pause, and its mail is tried.
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

# After so many new sessions in a row that ended without an answer to MAIL, the relay is to blame.
_UNANSWERED = 3


class SendCancelled(asyncio.CancelledError):
    """What a cancelled ``send`` raises: a CancelledError that says whether the mail was being handed over.

    ``rest`` is None if nothing of the message was sent. Otherwise the delivery goes on in this task, and its
    result is the outcome; to cancel the task cuts the delivery off. A caller that catches this must raise it
    again afterwards.
    """

    def __init__(self, rest: asyncio.Task[SendResult] | None = None) -> None:
        super().__init__()
        self.rest = rest


class PoolClosedError(Exception):
    """The pool was closed, so the relay will not become available through it again."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A glance at the pool, for health and metrics."""

    available: bool
    busy: int
    idle: int
    opening: int
    waiting: int
    """Sends that wait for a session."""
    opened: int
    """Sessions opened since the start."""
    trouble: NotSent | None
    """What failed last, while the pool is down."""


class SmtpPool:
    """Sends mail over sessions with one relay, kept open and reused. Belongs to one event loop.

    A relay that takes fewer sessions than ``limits.sessions`` is respected: when a further one is refused
    while others work, those carry on alone for a while. ``on_trouble`` is told what keeps the relay from
    being used whenever that changes, and None when it is over.
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
        # Whether one mail may be sent though the pool is down, and whether nobody was woken for it.
        self._probe = False
        self._probe_pending = False
        self._recovery: asyncio.Task[None] | None = None
        self._closing = False

    async def send(self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]) -> SendResult:
        """Send one mail to one recipient, waiting for a free session if need be.

        Args:
            mail_from: the return path; empty for the null one (RFC 5321 §4.5.5).
            message: with CRLF line ends, not dot-stuffed.
            guard: called before the envelope and again before the message is written; False stops it there.

        Returns:
            Exactly one of: ``Sent``; ``Rejected``, the server refused this mail; ``NotSent``, the server
            certainly does not have it (``spares_attempt``: for a reason that is not this mail's);
            ``InDoubt``, handed over and not answered; ``LeaseLost``, the guard returned False.

        Raises:
            ValueError: addresses or a message that cannot be sent as they are; nothing was sent.
            SendCancelled: if the task is cancelled. Until the server asks for the message, that aborts the
                session; from then on the delivery goes on without the caller.
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
        """False while the relay cannot be used: sends then return ``NotSent(ours=True)`` at once."""
        return self._trouble is None and not self._closing

    async def wait_available(self) -> None:
        """Wait, without limit, until the relay can be used, or until the caller's mail may be tried.

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
        """Refuse new sends, let those under way end for ``grace`` seconds, say QUIT everywhere.

        What is still under way then is aborted: those sends return ``NotSent`` or ``InDoubt``.
        """
        self._closing = True
        self._wake(len(self._waiting))
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._sessions.close(grace)

    def _mark_down(self, trouble: NotSent) -> None:
        """Stop sending until a session can be had again, or until a mail that is tried is taken."""
        # Those that waited learn of it a turn of the loop later, when it may be over.
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
        """Let so many go that wait for the relay, the first to come first; return how many went."""
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
                # There are sessions, and no mail is taken: only another mail can tell whether that is over.
                self._failures += 1
                self._probe = True
                self._probe_pending = not self._wake(1)
                continue
            try:
                self._sessions.release(await self._sessions.open())
                self._mark_up()
            except UnavailableError as error:
                # A send may have opened a session meanwhile.
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
        """The outcome; ours where the relay has not answered MAIL in several new sessions in a row.

        MAIL names no recipient. One such session says little: it may have been the network, or this mail.
        """
        if (
            isinstance(outcome, NotSent)
            and outcome.step is TransactionStep.MAIL
            and not outcome.spares_attempt
        ):
            # Where all commands went at once, the silence may be about the recipient.
            silent = session.connection.timed_out and "PIPELINING" in session.extensions
            if session.fresh and not silent:
                self._unanswered += 1
                if self._unanswered >= _UNANSWERED:
                    return replace(outcome, spares_attempt=True)
        elif isinstance(outcome, Sent | InDoubt) or getattr(outcome, "step", None) is not None:
            self._unanswered = 0
        return outcome

    def _proves_recovery(self, outcome: SendResult) -> bool:
        """Whether it shows that the relay takes what it refused: a mail taken, or refused there or later."""
        if not isinstance(outcome, Rejected):
            return isinstance(outcome, Sent)
        refused = self._trouble.step if self._trouble is not None else None
        return outcome.step is not None and (refused is None or outcome.step.reaches(refused))
