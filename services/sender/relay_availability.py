"""Whether the sender can use its relay, and how it finds out when trouble is over."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from services.sender.masking import without_addresses
from services.sender.replies import OPENING, InDoubt, NotSent, Rejected, SendResult, Sent, TransactionStep
from services.sender.smtp_relay import Limits
from services.sender.smtp_session import Session, UnavailableError
from services.sender.smtp_sessions import backoff_seconds

__all__ = ["PoolClosedError", "RelayAvailability"]

_log = structlog.get_logger()

# This many new sessions in a row without a reply to MAIL show that the relay is at fault.
_UNANSWERED = 3


class PoolClosedError(Exception):
    """The pool was closed: its relay will not become available again."""


class RelayAvailability:
    """The availability of one relay, judged by the results of sends. Belongs to one event loop.

    While the relay is down and no session comes about, it tries to open one, with growing pauses. While the
    relay refuses the account, it lets one mail go after each pause as a probe. It calls ``on_trouble`` at
    each change, and ``fail_waiting`` when trouble begins. ``open_session`` opens a session and puts it to
    use, or raises UnavailableError.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        on_trouble: Callable[[NotSent | None], None],
        *,
        fail_waiting: Callable[[NotSent], None],
        open_session: Callable[[], Awaitable[None]],
    ) -> None:
        self._name = name
        self._limits = limits
        self._fail_waiting = fail_waiting
        self._open_session = open_session
        self.trouble: NotSent | None = None
        """What failed last; None while the relay is up."""
        self._last_trouble: NotSent | None = None
        self._failures = 0
        self._unanswered = 0
        self._on_trouble = on_trouble
        self._waiting: dict[asyncio.Future[None], None] = {}
        # Whether one mail may be sent as a probe while the relay is down, and whether no waiter was woken
        # for it.
        self._probe = False
        self._probe_pending = False
        self._recovery: asyncio.Task[None] | None = None
        self.closing = False

    def take_probe(self) -> bool:
        """Return whether the caller's mail is the probe; the next caller's is not."""
        probe, self._probe = self._probe, False
        return probe

    @property
    def blocking(self) -> NotSent | None:
        """The trouble that a send returns at once; None if the relay is up or a probe is due."""
        return None if self._probe else self.trouble

    async def wait(self) -> None:
        """Wait, without a limit, until the relay is up or the caller's mail may go as a probe.

        Raises:
            PoolClosedError: the pool is closed, or is closed meanwhile.
        """
        if self.trouble is not None and not self.closing and not self._probe_pending:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[waiter] = None
            try:
                await waiter
            finally:
                self._waiting.pop(waiter, None)
        if self.closing:
            raise PoolClosedError
        self._probe_pending = False

    async def close(self) -> None:
        """End all waits and the recovery."""
        self.closing = True
        self._wake(len(self._waiting))
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])

    def session_opened(self) -> None:
        """Mark the relay as up if its trouble was that no session came about."""
        if self.trouble is not None and self.trouble.phase in OPENING:
            self._mark_up()

    def judge(self, session: Session, result: SendResult, probe: bool) -> SendResult:
        """Take a send's result into account, and return it.

        It has ``spares_attempt`` if it shows that the relay is at fault. ``probe`` says whether the mail
        was one.
        """
        if self.trouble is None and isinstance(result, Sent):
            self._failures = self._unanswered = 0
            return result
        result = self._count_unanswered(session, result)
        if isinstance(result, NotSent) and result.spares_attempt:
            self.mark_down(result)
        elif (
            not (isinstance(result, Rejected) and result.about_session)
            and (probe or self.trouble is None)
            and self._proves_recovery(result)
        ):
            self._failures = 0
            self._mark_up()
        return result

    def mark_down(self, trouble: NotSent) -> None:
        """Mark the relay as down until a session comes about, or until the relay takes a probe."""
        if self.closing or trouble is self._last_trouble:
            return
        new = self.trouble is None
        self._last_trouble = trouble
        self._set_trouble(trouble)
        if not new:
            return
        self._failures += 1
        _log.warning(
            "relay_down", relay=trouble.relay, phase=trouble.phase, cause=without_addresses(trouble.cause)
        )
        self._fail_waiting(trouble)
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    def _mark_up(self) -> None:
        if self.trouble is not None:
            self._probe = self._probe_pending = False
            self._set_trouble(None)
            self._wake(len(self._waiting))
            _log.info("relay_up", relay=self._name)

    def _set_trouble(self, trouble: NotSent | None) -> None:
        self.trouble = trouble
        self._on_trouble(trouble)

    def _wake(self, count: int) -> int:
        """Wake the first ``count`` waiters of ``wait_available``; return how many there were."""
        woken = [waiter for waiter in self._waiting if not waiter.done()][:count]
        for waiter in woken:
            waiter.set_result(None)
        return len(woken)

    async def _recover(self) -> None:
        while self.trouble is not None:
            await asyncio.sleep(backoff_seconds(self._limits, self._failures))
            if self.trouble is None:
                return
            if self.trouble.phase not in OPENING:
                # Sessions come about, but the relay refuses all mails: only another mail shows whether that
                # is over.
                self._failures += 1
                self._probe = True
                self._probe_pending = not self._wake(1)
                continue
            try:
                await self._open_session()
                self._mark_up()
            except UnavailableError as error:
                # A send may have brought the relay up meanwhile.
                if self.trouble is not None:
                    self._failures += 1
                    self._set_trouble(error.result)
            except Exception:
                # Nothing else would bring the relay up again.
                self._failures += 1
                _log.exception("relay_check_failed", relay=self._name)

    def _count_unanswered(self, session: Session, result: SendResult) -> SendResult:
        """Return the result, with ``spares_attempt`` if MAIL got no reply in several new sessions in a row.

        MAIL names no recipient, so the relay is at fault. A single such session may be due to the network.
        """
        if isinstance(result, NotSent) and result.step is TransactionStep.MAIL and not result.spares_attempt:
            # With pipelining all commands go at once, so the silence may concern the recipient.
            silent = session.connection.timed_out and "PIPELINING" in session.extensions
            if session.fresh and not silent:
                self._unanswered += 1
                if self._unanswered >= _UNANSWERED:
                    return replace(result, spares_attempt=True)
        elif isinstance(result, Sent | InDoubt) or getattr(result, "step", None) is not None:
            self._unanswered = 0
        return result

    def _proves_recovery(self, result: SendResult) -> bool:
        """Return whether the relay took the mail, or refused it no earlier than the trouble's step."""
        if not isinstance(result, Rejected):
            return isinstance(result, Sent)
        refused = self.trouble.step if self.trouble is not None else None
        return result.step is not None and (refused is None or result.step.reaches(refused))
