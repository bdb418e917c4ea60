"""The sender's SMTP client: a pool of sessions with one relay.

>>> pool = SmtpPool(Relay("mail.example.org", 587, credentials=Credentials("user", "secret")))
>>> outcome = await pool.send("shop@example.org", "ann@example.net", message, lambda: lease.holds)

While the relay cannot be reached the pool is *down*: every send returns ``NotSent(ours=True)`` at once, the
pool itself tries to get a session with growing pauses, and ``wait_available`` returns when it has one.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.sender.replies import InDoubt, NotSent, Outcome, Phase, Rejected, Sent
from services.sender.smtp_relay import Credentials, Limits, Relay, Timeouts, Tls
from services.sender.smtp_session import Session, UnavailableError, open_session
from services.sender.smtp_transaction import StaleSessionError, check_mail, deliver

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


class SendCancelled(asyncio.CancelledError):
    """What a cancelled ``send`` raises: a CancelledError that says what became of the mail.

    ``outcome`` is ``NotSent`` if its last byte was certainly not handed over, else ``InDoubt``. A caller that
    records it must raise this again afterwards.
    """

    def __init__(self, outcome: NotSent | InDoubt) -> None:
        super().__init__(outcome)
        self.outcome = outcome


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
    """Sessions with one relay, kept open and reused. Belongs to the event loop that it is first used on.

    A relay that takes fewer sessions than ``limits.sessions`` is respected: when a further one is refused
    while others work, those carry on alone for a while.
    """

    def __init__(
        self, relay: Relay, *, limits: Limits | None = None, timeouts: Timeouts | None = None
    ) -> None:
        self.relay = relay
        self._limits = limits or Limits()
        self._timeouts = timeouts or Timeouts()
        self._context = None if relay.tls is Tls.NONE else relay.tls_context()
        self._sessions: set[Session] = set()
        self._idle: deque[Session] = deque()  # the one used last on the right
        self._sockets: set[asyncio.Future[None]] = set()
        self._waiters: deque[asyncio.Future[Session | None]] = deque()
        self._opening = 0
        self._opened = 0
        self._failures = 0
        self._refusals = 0
        self._grow_after = 0.0
        self._trouble: NotSent | None = None
        self._up = asyncio.Event()
        self._up.set()
        self._recovery: asyncio.Task[None] | None = None
        self._reaper: asyncio.TimerHandle | None = None
        self._closing = False

    async def send(self, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]) -> Outcome:
        """Send one mail to one recipient, waiting for a free session if need be.

        Args:
            mail_from: the return path; empty for the null one (RFC 5321 §4.5.5).
            message: with CRLF line ends, not dot-stuffed.
            guard: called before the envelope and again before the message is written; False stops it there.

        Returns:
            Exactly one of: ``Sent``; ``Rejected``, the server said no to this mail; ``NotSent``, certainly
            not delivered (``ours``: nothing to do with this mail); ``InDoubt``, handed over and not answered;
            ``LeaseLost``, the guard said False.

        Raises:
            ValueError: addresses or a message that cannot be sent as they are; nothing was sent.
            SendCancelled: if the task is cancelled. The session is then aborted.
        """
        check_mail(mail_from, rcpt, message)
        session: Session | None = None
        try:
            while True:
                session = await self._acquire()
                try:
                    outcome = await deliver(session, mail_from, rcpt, message, guard)
                except StaleSessionError:
                    session = None
                    continue
                break
        except UnavailableError as error:
            return error.outcome
        except asyncio.CancelledError:
            raise SendCancelled(self._cancelled(session)) from None
        except BaseException:
            if session is not None:
                session.wire.abort("internal error")
            raise
        if isinstance(outcome, Sent | Rejected):
            self._failures = 0
        elif isinstance(outcome, NotSent) and outcome.ours:
            self._down(outcome)
        self._release(session)
        return outcome

    @property
    def available(self) -> bool:
        """False while the relay cannot be used: sends then return ``NotSent(ours=True)`` at once."""
        return self._trouble is None and not self._closing

    async def wait_available(self) -> None:
        """Wait, without limit, until the relay can be used.

        Raises:
            PoolClosedError: the pool is closed, or is closed meanwhile.
        """
        await self._up.wait()
        if self._closing:
            raise PoolClosedError

    @property
    def state(self) -> PoolState:
        return PoolState(
            available=self.available,
            busy=len(self._sessions) - len(self._idle),
            idle=len(self._idle),
            opening=self._opening,
            waiting=len(self._waiters),
            opened=self._opened,
            trouble=self._trouble,
        )

    async def close(self, grace: float = 10.0) -> None:
        """Refuse new sends, let those under way end for ``grace`` seconds, say QUIT everywhere.

        What is still under way then is aborted: those sends return ``NotSent`` or ``InDoubt``.
        """
        self._closing = True
        self._up.set()
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        if self._reaper is not None:
            self._reaper.cancel()
        closed = UnavailableError(Phase.CONNECT, "the pool is closed", self._where)
        while self._waiters:
            _answer(self._waiters.popleft(), closed)
        while self._idle:
            self._retire(self._idle.pop())
        busy = {session.wire.closed for session in self._sessions}
        if busy:
            await asyncio.wait(busy, timeout=grace)
        for session in tuple(self._sessions):
            session.wire.abort("closed by us")
        if self._sockets:
            await asyncio.wait(self._sockets, timeout=self._timeouts.quit + 1)

    # Sessions

    async def _acquire(self) -> Session:
        """An idle session, or a new one, or the first that comes free."""
        while True:
            if self._closing:
                raise UnavailableError(Phase.CONNECT, "the pool is closed", self._where)
            if self._trouble is not None:
                raise UnavailableError(self._trouble.phase, self._trouble.cause, self._where)
            if self._idle:
                return self._idle.pop()
            session = await (self._grow() if self._may_grow() else self._wait())
            if session is not None and self._closing:
                self._retire(session)
            elif session is not None:
                return session

    def _may_grow(self) -> bool:
        count = len(self._sessions) + self._opening
        if count >= self._limits.sessions:
            return False
        return not self._sessions or asyncio.get_running_loop().time() >= self._grow_after

    async def _wait(self) -> Session | None:
        """Wait for what another send gives back: its session, or None for the place of a lost one."""
        waiter: asyncio.Future[Session | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                given = waiter.result()
                if given is None:
                    self._wake()
                else:
                    self._release(given)
            raise

    async def _grow(self) -> Session | None:
        """A new session; None if the relay refuses more of them while it serves others."""
        self._opening += 1
        try:
            session = await open_session(self.relay, self._context, self._timeouts)
        except UnavailableError as error:
            if self._sessions:
                self._refusals += 1
                self._grow_after = asyncio.get_running_loop().time() + self._backoff(self._refusals)
                return None
            self._down(error.outcome)
            raise
        except asyncio.CancelledError:
            self._wake()
            raise
        finally:
            self._opening -= 1
        self._refusals = 0
        self._adopt(session)
        return session

    def _adopt(self, session: Session) -> None:
        self._opened += 1
        self._sessions.add(session)
        self._sockets.add(session.wire.closed)
        session.wire.closed.add_done_callback(self._sockets.discard)
        session.wire.watch(lambda: self._forget(session))
        self._back()

    def _forget(self, session: Session) -> None:
        """The session is over: its place is free."""
        self._sessions.discard(session)
        if session in self._idle:
            self._idle.remove(session)
        self._wake()

    def _release(self, session: Session) -> None:
        if session.wire.lost is not None:
            return
        session.fresh = False
        if self._closing or session.mails >= self._limits.mails_per_session:
            self._retire(session)
            return
        while self._waiters:
            if _answer(self._waiters.popleft(), session):
                return
        loop = asyncio.get_running_loop()
        session.idle_since = loop.time()
        self._idle.append(session)
        if self._reaper is None:
            self._reaper = loop.call_later(self._limits.idle, self._reap)

    def _wake(self) -> None:
        """Let one waiter try for a session of its own."""
        while self._waiters:
            if _answer(self._waiters.popleft(), None):
                return

    def _retire(self, session: Session) -> None:
        session.wire.quit(self._timeouts.quit)

    def _reap(self) -> None:
        self._reaper = None
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since + self._limits.idle <= loop.time():
            self._retire(self._idle.popleft())
        if self._idle:
            self._reaper = loop.call_at(self._idle[0].idle_since + self._limits.idle, self._reap)

    # Availability

    @property
    def _where(self) -> str:
        return f"{self.relay.host}:{self.relay.port}"

    def _backoff(self, failures: int) -> float:
        pause = min(self._limits.backoff * 2.0 ** min(failures - 1, 16), self._limits.backoff_max)
        return pause * random.uniform(0.75, 1.25)

    def _down(self, trouble: NotSent) -> None:
        """Stop sending until a session can be had again."""
        if self._closing or self._trouble is not None:
            return
        self._failures += 1
        self._trouble = trouble
        self._up.clear()
        _log.warning("relay_down", relay=trouble.relay, phase=trouble.phase, cause=trouble.cause)
        error = UnavailableError(trouble.phase, trouble.cause, self._where)
        while self._waiters:
            _answer(self._waiters.popleft(), error)
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    def _back(self) -> None:
        if self._trouble is not None:
            self._trouble = None
            self._up.set()
            _log.info("relay_up", relay=self._where)

    async def _recover(self) -> None:
        while self._trouble is not None:
            await asyncio.sleep(self._backoff(self._failures))
            if self._trouble is not None and self._sessions:
                # It was refused at MAIL for want of AUTH: only another mail can tell whether that has
                # changed.
                self._back()
            if self._trouble is None:
                return
            try:
                session = await open_session(self.relay, self._context, self._timeouts)
            except UnavailableError as error:
                self._failures += 1
                self._trouble = error.outcome
            else:
                self._adopt(session)
                self._release(session)

    def _cancelled(self, session: Session | None) -> NotSent | InDoubt:
        if session is None:
            return NotSent(Phase.CONNECT, "cancelled", False, self._where)
        session.wire.abort("cancelled")
        if not session.handing_over:
            return NotSent(Phase.ENVELOPE, "cancelled", False, session.name)
        if session.wire.unsent:
            return NotSent(Phase.DATA, "cancelled", False, session.name)
        return InDoubt("cancelled", session.name)


def _answer(waiter: "asyncio.Future[Session | None]", answer: Session | UnavailableError | None) -> bool:
    """Give a waiter its answer; False if it no longer waits."""
    if waiter.done():
        return False
    if isinstance(answer, UnavailableError):
        waiter.set_exception(answer)
    else:
        waiter.set_result(answer)
    return True
