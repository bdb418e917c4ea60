"""The sessions with one relay: how many there are, when another one may be opened, and when one is closed."""

import asyncio
import random
from collections import deque
from collections.abc import Callable

from services.sender.slots import domain_share
from services.sender.smtp_mail import OutgoingMail
from services.sender.smtp_opening import open_session
from services.sender.smtp_relay import Limits, Relay, Timeouts, Tls
from services.sender.smtp_session import RelayMemory, Session

__all__ = ["Sessions", "backoff_seconds"]


def backoff_seconds(limits: Limits, failures: int) -> float:
    """Return the seconds to wait after so many failures in a row: doubling, with jitter."""
    return min(limits.backoff * 2.0 ** min(failures - 1, 16), limits.backoff_max) * random.uniform(0.75, 1.25)


class Sessions:
    """Opens and closes sessions within ``limits``, and keeps the idle ones. Belongs to one event loop.

    It returns the idle session that was used last, so that sessions above the need stay idle and are closed.
    It calls ``on_may_grow`` when another session may be opened again.

    A relay may take fewer sessions than the limit. Mails to one domain must not use all of those either, so
    the domain's share is one of the sessions that the relay takes.
    """

    def __init__(
        self, relay: Relay, limits: Limits, timeouts: Timeouts, on_may_grow: Callable[[], None]
    ) -> None:
        self._relay = relay
        self._limits = limits
        self._timeouts = timeouts
        self._on_may_grow = on_may_grow
        self._memory = RelayMemory()
        self._context = None if relay.tls is Tls.NONE else relay.tls_context()
        self._ready: set[Session] = set()
        self._idle: deque[Session] = deque()  # the one that was used last is on the right
        self._sockets: set[asyncio.Future[None]] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        # How many sessions the relay takes, as far as is known.
        self._taken = limits.sessions
        self._refusals = 0
        self._growth_timer: asyncio.TimerHandle | None = None
        self.closing = False
        self.openings: set[object] = set()
        """The tasks that open a session."""
        self.opened = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def ending(self) -> int:
        """Sessions that are over and whose sockets are not closed yet: the relay may still count them."""
        return len(self._sockets) - len(self._ready)

    @property
    def may_grow(self) -> bool:
        """Whether another session may be opened."""
        if len(self._sockets) + len(self.openings) >= self._limits.sessions or self.closing:
            return False
        has_place = len(self._ready) + len(self.openings) < self._taken
        return not self._ready or self._growth_timer is None or has_place

    def admits(self, mail: OutgoingMail, besides: Session | None = None) -> bool:
        """Return whether a session may have this mail, since its domain uses less than its share.

        `besides` is a session that does not count as used.
        """
        share = domain_share(self._taken, self._limits.per_domain)
        if not share or self._taken >= self._limits.sessions:
            return True
        used = (session.transactions.mail for session in self._ready if session is not besides)
        return sum(other is not None and other.domain == mail.domain for other in used) < share

    def take_idle(self) -> Session | None:
        """Return an idle session, which the caller must ``release``; None if there is none."""
        return self._idle.pop() if self._idle else None

    def may_go_on(self, session: Session) -> bool:
        """Return whether a session may take another mail."""
        return (
            session.mails < self._limits.mails_per_session
            and session.connection.lost is None
            and not self.closing
        )

    def release(self, session: Session) -> None:
        """Take back a session that may go on; QUIT any other one."""
        session.fresh = False
        if not self.may_go_on(session):
            self.end(session)
            return
        loop = asyncio.get_running_loop()
        session.idle_since = loop.time()
        self._idle.append(session)
        if self._idle_timer is None:
            self._idle_timer = loop.call_later(self._limits.idle, self._close_idle)

    def end(self, session: Session) -> None:
        """Close a session that the caller holds."""
        session.connection.quit(self._timeouts.quit)

    def end_idle(self) -> None:
        """Close the session that has been idle for longest, if there is one."""
        if self._idle:
            self.end(self._idle.popleft())

    async def open(self) -> Session:
        """Return a new session, which the caller must ``release``.

        Raises:
            UnavailableError: no session came about.
        """
        task = asyncio.current_task()
        self.openings.add(task)
        try:
            session = await open_session(self._relay, self._context, self._timeouts, self._memory)
        finally:
            self.openings.discard(task)
        self._refusals = 0
        self.opened += 1
        self._ready.add(session)
        self._taken = max(self._taken, len(self._ready))
        self._sockets.add(session.connection.closed)
        session.connection.closed.add_done_callback(lambda socket: self._socket_closed(socket, session))
        session.connection.watch(lambda: self._remove(session))
        return session

    def delay_growth(self) -> None:
        """Open no further session for a while: the relay refused one while it serves others."""
        self._taken = len(self._ready)
        if self._growth_timer is None:
            self._refusals += 1
            self._growth_timer = asyncio.get_running_loop().call_later(
                backoff_seconds(self._limits, self._refusals), self._allow_growth
            )

    async def close(self, grace: float) -> None:
        """Open no more sessions; QUIT idle ones at once and others when they are released.

        After ``grace`` seconds abort those that are still in use.
        """
        self.closing = True
        for timer in (self._idle_timer, self._growth_timer):
            if timer is not None:
                timer.cancel()
        while self._idle:
            self.end_idle()
        if self._ready:
            await asyncio.wait({session.connection.closed for session in self._ready}, timeout=grace)
        for session in tuple(self._ready):
            session.connection.abort("closed by us")
        if self._sockets:
            await asyncio.wait(self._sockets, timeout=self._timeouts.quit + 1)

    def _allow_growth(self) -> None:
        self._growth_timer = None
        self._on_may_grow()

    def _remove(self, session: Session) -> None:
        self._ready.discard(session)
        if session in self._idle:
            self._idle.remove(session)

    def _socket_closed(self, socket: asyncio.Future[None], session: Session) -> None:
        self._sockets.discard(socket)
        session.transactions.over()
        self._on_may_grow()

    def _close_idle(self) -> None:
        """Close the sessions that have been idle for too long."""
        self._idle_timer = None
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since + self._limits.idle <= loop.time():
            self.end_idle()
        if self._idle:
            self._idle_timer = loop.call_at(self._idle[0].idle_since + self._limits.idle, self._close_idle)
