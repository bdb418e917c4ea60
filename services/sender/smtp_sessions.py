"""The sessions with one relay: who uses which, when another one is opened, and when one is closed."""

import asyncio
import random
from collections import deque
from typing import NamedTuple

from services.sender.replies import Phase
from services.sender.smtp_opening import open_session
from services.sender.smtp_relay import Limits, Relay, Timeouts, Tls
from services.sender.smtp_session import RelayMemory, Session, UnavailableError

__all__ = ["Sessions", "backoff_seconds"]


class _SessionWaiter(NamedTuple):
    turn: asyncio.Future[Session | None]
    fresh: bool
    """Whether the waiter needs a new session."""


def backoff_seconds(limits: Limits, failures: int) -> float:
    """Return the seconds to wait after so many failures in a row: doubling, with jitter."""
    return min(limits.backoff * 2.0 ** min(failures - 1, 16), limits.backoff_max) * random.uniform(0.75, 1.25)


class Sessions:
    """Lends sessions to sends, within ``limits``. Belongs to one event loop.

    It lends the session that was used last, so that sessions above the need stay idle and are closed. Waiting
    sends are served in the order of their calls.
    """

    def __init__(self, relay: Relay, limits: Limits, timeouts: Timeouts) -> None:
        self._relay = relay
        self._limits = limits
        self._timeouts = timeouts
        self._memory = RelayMemory()
        self._context = None if relay.tls is Tls.NONE else relay.tls_context()
        self._ready: set[Session] = set()
        self._idle: deque[Session] = deque()  # the one that was used last is on the right
        self._sockets: set[asyncio.Future[None]] = set()
        self._waiters: deque[_SessionWaiter] = deque()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._refusals = 0
        self._growth_timer: asyncio.TimerHandle | None = None
        self._closing = False
        self.opening = 0
        self.opened = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    async def acquire(self, *, fresh: bool = False) -> Session:
        """Return an idle session, a new one, or the first that is released. The caller must ``release`` it.

        Args:
            fresh: the session must be a new one; the limits hold all the same.

        Raises:
            UnavailableError: no session came about.
        """
        while not self._closing:
            if self._idle and not fresh:
                return self._idle.pop()
            if self._idle and not self._may_grow() and self._needs_place(1):
                self._idle.popleft().connection.quit(self._timeouts.quit)
            session = await (self._grow() if self._may_grow() else self._wait(fresh))
            if session is not None:
                return session
        raise self._closed()

    def release(self, session: Session) -> None:
        """Take back a session, also one that is over."""
        if session.connection.lost is not None:
            return
        session.fresh = False
        if self._closing or session.mails >= self._limits.mails_per_session:
            session.connection.quit(self._timeouts.quit)
            return
        while (waiter := next((w for w in self._waiters if not w.fresh), None)) is not None:
            self._waiters.remove(waiter)
            if _resume(waiter, session):
                return
        if self._needs_place(0):
            session.connection.quit(self._timeouts.quit)
            return
        loop = asyncio.get_running_loop()
        session.idle_since = loop.time()
        self._idle.append(session)
        if self._idle_timer is None:
            self._idle_timer = loop.call_later(self._limits.idle, self._close_idle)

    def end(self, session: Session) -> None:
        """Close a session that a send holds. The send must ``release`` it all the same."""
        session.connection.quit(self._timeouts.quit)

    async def open(self) -> Session:
        """Return a new session, ahead of all waiting sends.

        Raises:
            UnavailableError: no session came about.
        """
        self.opening += 1
        try:
            session = await open_session(self._relay, self._context, self._timeouts, self._memory)
        except UnavailableError:
            raise
        except BaseException:
            # The relay is not at fault, so waiting sends get no error: one of them tries.
            asyncio.get_running_loop().call_soon(self._wake)
            raise
        finally:
            self.opening -= 1
        self._refusals = 0
        self.opened += 1
        self._ready.add(session)
        self._sockets.add(session.connection.closed)
        session.connection.closed.add_done_callback(self._socket_closed)
        session.connection.watch(lambda: self._remove(session))
        # Sends that began to wait while the relay refused further sessions may now open their own.
        self._wake()
        return session

    def fail_waiters(self, error: UnavailableError) -> None:
        """Have all waiting sends raise ``error``."""
        while self._waiters:
            _resume(self._waiters.popleft(), error)

    async def close(self, grace: float) -> None:
        """Open no more sessions; QUIT idle ones at once and others when they are released.

        After ``grace`` seconds abort those that are still in use.
        """
        self._closing = True
        for timer in (self._idle_timer, self._growth_timer):
            if timer is not None:
                timer.cancel()
        self.fail_waiters(self._closed())
        while self._idle:
            self._idle.pop().connection.quit(self._timeouts.quit)
        if self._ready:
            await asyncio.wait({session.connection.closed for session in self._ready}, timeout=grace)
        for session in tuple(self._ready):
            session.connection.abort("closed by us")
        if self._sockets:
            await asyncio.wait(self._sockets, timeout=self._timeouts.quit + 1)

    def _may_grow(self) -> bool:
        # A closing socket counts, since the relay may still count it.
        if len(self._sockets) + self.opening >= self._limits.sessions or self._closing:
            return False
        return not self._ready or self._growth_timer is None

    def _needs_place(self, more: int) -> bool:
        """Return whether more sends wait (with ``more`` added) than sockets are closing."""
        return len(self._waiters) + more > len(self._sockets) - len(self._ready)

    async def _grow(self) -> Session | None:
        """Return a new session; None if the relay refuses it while it serves others."""
        try:
            return await self.open()
        except UnavailableError:
            if not self._ready:
                raise
        if self._growth_timer is None:
            self._refusals += 1
            loop = asyncio.get_running_loop()
            self._growth_timer = loop.call_later(
                backoff_seconds(self._limits, self._refusals), self._allow_growth
            )
        return None

    def _allow_growth(self) -> None:
        self._growth_timer = None
        self._wake()

    async def _wait(self, fresh: bool) -> Session | None:
        """Wait for a released session; None: the caller may open one in place of a lost session."""
        waiter = _SessionWaiter(asyncio.get_running_loop().create_future(), fresh)
        self._waiters.append(waiter)
        turn = waiter.turn
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                given = turn.result()
                if given is None:
                    self._wake()
                else:
                    self.release(given)
            raise

    def _wake(self) -> None:
        """Let one waiting send open a session, if the limits allow it."""
        while self._waiters and self._may_grow():
            if _resume(self._waiters.popleft(), None):
                return

    def _remove(self, session: Session) -> None:
        self._ready.discard(session)
        if session in self._idle:
            self._idle.remove(session)

    def _socket_closed(self, socket: asyncio.Future[None]) -> None:
        self._sockets.discard(socket)
        self._wake()

    def _close_idle(self) -> None:
        """Close the sessions that have been idle for too long."""
        self._idle_timer = None
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since + self._limits.idle <= loop.time():
            self._idle.popleft().connection.quit(self._timeouts.quit)
        if self._idle:
            self._idle_timer = loop.call_at(self._idle[0].idle_since + self._limits.idle, self._close_idle)

    def _closed(self) -> UnavailableError:
        return UnavailableError.during(Phase.CONNECT, "the pool is closed", self._relay.name)


def _resume(waiter: _SessionWaiter, answer: Session | UnavailableError | None) -> bool:
    """Resume a waiter with its answer; return False if it no longer waits."""
    if waiter.turn.done():
        return False
    if isinstance(answer, UnavailableError):
        waiter.turn.set_exception(answer)
    else:
        waiter.turn.set_result(answer)
    return True
