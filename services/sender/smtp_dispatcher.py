"""Which session sends which mail: the queue, the mails chained behind others, and the results."""

import asyncio
from collections import deque
from collections.abc import Callable

import structlog

from services.sender.masking import reply_codes
from services.sender.relay_availability import RelayAvailability
from services.sender.replies import NotSent, Phase, Rejected, SendResult
from services.sender.smtp_chained import ChainedMails
from services.sender.smtp_mail import MailState, OutgoingMail
from services.sender.smtp_relay import Limits, Relay, Timeouts
from services.sender.smtp_session import Session, UnavailableError
from services.sender.smtp_sessions import Sessions
from services.sender.smtp_transaction import Transactions

__all__ = ["Dispatcher"]

_log = structlog.get_logger()


class Dispatcher:
    """Gives mails to sessions in the order of their calls. Belongs to one event loop.

    A mail goes to an idle session, to a new one, or to the first that is free. Where all sessions within the
    limit are busy, its envelope may follow another mail's message: it is *chained*.

    A chained mail that is stuck (`ChainedMails`) returns to the head of the queue, and then goes to a free
    session only. Its old session ends with the reply that it waits for.
    """

    def __init__(
        self, relay: Relay, limits: Limits, timeouts: Timeouts, on_trouble: Callable[[NotSent | None], None]
    ) -> None:
        self._relay = relay
        self._limits = limits
        self._waiting: deque[OutgoingMail] = deque()
        self._refused: deque[OutgoingMail] = deque()  # those that need a new session
        self._openings: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._chained = ChainedMails(self._is_free, self._return_chained)
        self.sessions = Sessions(relay, limits, timeouts, self._schedule)
        self.availability = RelayAvailability(
            relay.name, limits, on_trouble, fail_waiting=self._fail_waiting, open_session=self._open
        )

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._refused)

    def submit(self, mail: OutgoingMail) -> None:
        """Send a mail that ``check_mail`` accepted as soon as a session is free."""
        trouble = self.availability.blocking
        if self.sessions.closing:
            trouble = self._closed
        if trouble is not None:
            asyncio.get_running_loop().call_soon(self._deliver, mail, trouble)
            mail.state = MailState.ENDED
            return
        mail.probe = mail.free_session_only = self.availability.take_probe()
        mail.state = MailState.WAITING
        self._waiting.append(mail)
        self._schedule()

    def withdraw(self, mail: OutgoingMail) -> bool:
        """Take a mail back; see ``SmtpPool.withdraw``."""
        if mail.state is MailState.WAITING:
            (self._refused if mail in self._refused else self._waiting).remove(mail)
            for opening in tuple(self._openings)[self.waiting :]:
                opening.cancel()
        elif mail.state is MailState.ENVELOPE and mail.transactions is not None:
            self._chained.discard(mail)
            mail.transactions.drop(mail)
        else:
            mail.no_other_session = True
            return False
        mail.state = MailState.ENDED
        return True

    def cut_off(self, mail: OutgoingMail) -> None:
        """Abort the session of a mail whose message is being sent or was."""
        if mail.state is MailState.MESSAGE and mail.transactions is not None:
            mail.no_other_session = True
            mail.transactions.cut_off()

    async def close(self, grace: float) -> None:
        """Refuse new mails, and end the sessions; see ``SmtpPool.close``."""
        self.sessions.closing = True
        await self.availability.close()
        self._chained.close()
        self._return_chained(list(self._chained))
        for opening in self._openings:
            opening.cancel()
        if self._openings:
            await asyncio.wait(self._openings)
        self._fail_waiting(self._closed)
        await self.sessions.close(grace)

    @property
    def _closed(self) -> NotSent:
        return UnavailableError.during(Phase.CONNECT, "the pool is closed", self._relay.name).result

    # --- From the queue to a session

    def _schedule(self) -> None:
        """Have the waiting mails dispatched in the loop's next turn."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        sessions = self.sessions
        while self._next() is not None and (session := sessions.take_idle()) is not None:
            self._serve(session)
        missing = self.waiting - len(self._openings)
        while missing > 0 and sessions.may_grow:
            opening = asyncio.get_running_loop().create_task(self._open_one())
            self._openings.add(opening)
            sessions.openings.add(opening)
            opening.add_done_callback(self._opening_ended)
            missing -= 1
        if len(self._refused) > len(self._openings) + sessions.ending:
            # They wait for a new session, and only the end of an idle one lets it be opened.
            sessions.end_idle()

    def _serve(self, session: Session) -> None:
        """Give a free session the next mail; without one it is idle."""
        while self.sessions.may_go_on(session):
            if session.fresh and self._refused:
                mail = self._refused.popleft()
            elif (following := self._next()) is not None:
                mail = following
                self._waiting.remove(mail)
            else:
                break
            self._chained.begun += 1
            try:
                result = session.transactions.begin(mail)
            except Exception:
                _log.exception("smtp_internal_error")
                session.connection.abort("internal error")
                result = NotSent(Phase.ENVELOPE, "internal error", False, session.name)
            if result is None:
                return
            self._conclude(session, mail, result)
        self.sessions.release(session)
        if len(self._refused) > len(self._openings) + self.sessions.ending:
            self._schedule()

    def _next(self) -> OutgoingMail | None:
        """Return the first waiting mail that a free session may have."""
        return next(filter(self.sessions.admits, self._waiting), None)

    async def _open_one(self) -> None:
        """Open a session for a waiting mail."""
        try:
            await self._open()
        except UnavailableError as error:
            self._forget_opening()
            if len(self.sessions):
                self.sessions.delay_growth()
            else:
                self.availability.mark_down(error.result)
                self._fail_waiting(error.result)
        except Exception as error:
            # The relay is not at fault: one mail ends, and each other one tries by itself.
            _log.exception("session_not_opened", relay=self._relay.name)
            if self.waiting:
                mail = (self._refused or self._waiting).popleft()
                cause = f"internal error: {error}"
                self._deliver(mail, NotSent(Phase.CONNECT, cause, False, self._relay.name))

    def _opening_ended(self, opening: asyncio.Task[None]) -> None:
        self._openings.discard(opening)
        self.sessions.openings.discard(opening)
        self._schedule()

    def _forget_opening(self) -> None:
        task = asyncio.current_task()
        self._openings = {opening for opening in self._openings if opening is not task}

    async def _open(self) -> None:
        """Open a session, and give it a mail.

        Raises:
            UnavailableError: no session came about.
        """
        session = await self.sessions.open()
        self._forget_opening()
        session.transactions = Transactions(session, self)
        self.availability.session_opened()
        self._serve(session)

    def _fail_waiting(self, result: NotSent) -> None:
        """End the waiting mails, but for as many as sessions are being opened."""
        while self.waiting > len(self._openings):
            self._deliver((self._waiting or self._refused).popleft(), result)

    # --- Chained mails

    def next_to_chain(self, session: Session) -> OutgoingMail | None:
        """Return the mail at the head of the queue if all sessions are busy, and none must become free."""
        if not self._waiting or self._refused or session.mails >= self._limits.mails_per_session:
            return None
        mail, sessions = self._waiting[0], self.sessions
        if (
            mail.free_session_only
            or sessions.idle
            or sessions.openings
            or sessions.may_grow
            or sessions.closing
        ):
            return None
        return mail if sessions.admits(mail, besides=session) else None

    def chain(self, mail: OutgoingMail) -> None:
        """Take the mail that ``next_to_chain`` returned."""
        self._waiting.popleft()
        self._chained.begun += 1
        self._chained.add(mail)

    def reached(self, mail: OutgoingMail) -> None:
        """Note that a chained mail waits for no other mail's reply anymore."""
        self._chained.discard(mail)

    def _is_free(self) -> bool:
        return self.sessions.idle > 0 or self.sessions.may_grow

    def _return_chained(self, mails: list[OutgoingMail]) -> None:
        for mail in reversed(mails):
            if mail.transactions is not None:
                mail.transactions.drop(mail)
                self.try_again(mail)

    def try_again(self, mail: OutgoingMail) -> None:
        """Take a mail back, of which nothing was sent: it goes to the next free session."""
        self._chained.discard(mail)
        mail.free_session_only = True
        if self.sessions.closing:
            self._deliver(mail, self._closed)
            return
        mail.state = MailState.WAITING
        self._waiting.appendleft(mail)
        self._schedule()

    # --- Results

    def finish(self, session: Session, mail: OutgoingMail, result: SendResult) -> None:
        """Take a mail's result, and give its session the next mail if it is free."""
        result = self._judge(session, mail, result)
        if session.transactions.mail is None:
            self._serve(session)
        self._deliver_or_repeat(mail, result)

    def _conclude(self, session: Session, mail: OutgoingMail, result: SendResult) -> None:
        self._deliver_or_repeat(mail, self._judge(session, mail, result))

    def _judge(self, session: Session, mail: OutgoingMail, result: SendResult) -> SendResult:
        result = self.availability.judge(session, result, mail.probe)
        session.fresh = False
        if isinstance(result, Rejected) and result.about_session:
            if session.transactions.mail is not None:
                session.transactions.return_mail("the session was refused")
            self.sessions.end(session)
        return result

    def _deliver_or_repeat(self, mail: OutgoingMail, result: SendResult) -> None:
        if (
            isinstance(result, Rejected)
            and result.about_session
            and not (mail.on_second_session or mail.no_other_session)
        ):
            _log.debug(
                "session_refused", relay=result.relay, phase=result.phase, reply=reply_codes(result.reply)
            )
            if self.sessions.closing:
                self._deliver(mail, self._closed)
                return
            mail.on_second_session = True
            mail.state = MailState.WAITING
            self._refused.append(mail)
            self._schedule()
        else:
            self._deliver(mail, result)

    def _deliver(self, mail: OutgoingMail, result: SendResult) -> None:
        mail.state = MailState.ENDED
        mail.transactions = None
        try:
            mail.on_result(result)
        except Exception:
            _log.exception("mail_result_not_taken")
