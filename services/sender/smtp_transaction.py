"""The mail transactions of one session: envelope, message and reply (RFC 5321 §3.3, RFC 2920)."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from services.sender.refusals import RefusalScope, refusal_scope
from services.sender.replies import (
    InDoubt,
    LeaseLost,
    NotSent,
    Phase,
    Rejected,
    Reply,
    SendResult,
    Sent,
    TransactionStep,
)
from services.sender.retry_hints import retry_hint
from services.sender.smtp_mail import MailState, OutgoingMail, commands, stuffed
from services.sender.smtp_session import Session

__all__ = ["MailSource", "Transactions"]

_STEPS = (TransactionStep.MAIL, TransactionStep.RCPT, TransactionStep.DATA)
_SLOWEST = 10_000  # bytes a second: a message may leave no slower
_CANCELLED = "cancelled"
# Another mail's envelope follows a message of this many bytes at most, which the kernel takes at once.
_SMALL = 1 << 15
# It follows only where the server answered the message before within this time (seconds).
_PROMPT = 0.1


class MailSource(Protocol):
    """Where the mails come from and where their results go."""

    def next_to_chain(self, session: Session) -> OutgoingMail | None:
        """Return the mail whose envelope may follow this session's message, without taking it."""
        ...

    def chain(self, mail: OutgoingMail) -> None:
        """Take the mail that ``next_to_chain`` returned: its envelope is written behind another message."""
        ...

    def reached(self, mail: OutgoingMail) -> None:
        """Say that the server has answered the message before a chained mail's envelope."""
        ...

    def try_again(self, mail: OutgoingMail) -> None:
        """Take a mail back, of which nothing was sent, for another session at once."""
        ...

    def finish(self, session: Session, mail: OutgoingMail, result: SendResult) -> None:
        """Take a mail's result. The session is free if it has no other mail."""
        ...


class Transactions:
    """Sends the mails of one session, one after another, without waiting: each reply leads to the next step.

    While a message is written, the next mail's envelope may follow it in the same write. RSET comes before
    it, so a server that refuses the message and keeps its transaction open never takes the next mail's
    recipient into that one. Until its own message is written, the next mail may still be dropped.
    """

    __slots__ = (
        "_connection",
        "_dropped",
        "_left",
        "_reached",
        "_refusal",
        "_replies",
        "_session",
        "_source",
        "_written_at",
        "chained",
        "mail",
    )

    def __init__(self, session: Session, source: MailSource) -> None:
        self._session = session
        self._connection = session.connection
        self._source = source
        self.mail: OutgoingMail | None = None
        """The mail whose envelope or message the server is to answer next."""
        self.chained: OutgoingMail | None = None
        """The mail whose envelope follows the message."""
        self._dropped = False  # whether the envelope behind the message is that of a dropped mail
        self._reached = True  # whether the server has come to the envelope of `mail`
        # A refusal whose scope shows only by whether the server closes the connection with it.
        self._refusal: tuple[Phase, TransactionStep, Reply] | None = None
        # Without PIPELINING: the commands that are left, and the replies to the others.
        self._left: deque[bytes] = deque()
        self._replies: list[Reply] = []
        self._written_at = 0.0

    def begin(self, mail: OutgoingMail) -> SendResult | None:
        """Write a mail's envelope on the free session; return its result if there is nothing to write."""
        envelope = commands(self._session, mail)
        if isinstance(envelope, Rejected):
            return envelope
        if not mail.guard():
            return LeaseLost(Phase.ENVELOPE)
        session, connection = self._session, self._connection
        self._take(mail)
        self.mail, self._reached = mail, True
        timeout = session.timeouts.command
        if session.pipelining:
            if session.needs_reset:
                connection.expect(1, timeout, self._on_reset)
                envelope = b"RSET\r\n" + envelope
            connection.expect(3, timeout, self._on_envelope)
            connection.write(envelope)
            return None
        self._left = deque(envelope.splitlines(keepends=True))
        self._replies = []
        if session.needs_reset:
            connection.expect(1, timeout, self._on_reset)
            connection.write(b"RSET\r\n")
        else:
            self._write_command()
        return None

    def drop(self, mail: OutgoingMail) -> None:
        """Send no more of a mail whose message is not written.

        Its connection is aborted, or ends after the reply to the message before.
        """
        if mail is self.mail:
            self.mail = self._refusal = None
            self._connection.abort(_CANCELLED)
        elif mail is self.chained:
            self.chained, self._dropped = None, True

    def cut_off(self) -> None:
        """Abort the connection: its mails end at once."""
        self._connection.abort(_CANCELLED)

    def over(self) -> None:
        """End what an internal error left without a result; the connection is over."""
        cause = self._connection.lost or "internal error"
        while (mail := self.mail) is not None:
            if mail.state is MailState.MESSAGE:
                self._end(InDoubt(cause, self._session.name))
            else:
                self._end(NotSent(Phase.ENVELOPE, cause, False, self._session.name))

    def _take(self, mail: OutgoingMail) -> None:
        mail.state = MailState.ENVELOPE
        mail.transactions = self
        self._session.mails += 1

    # --- The envelope

    def _write_command(self) -> None:
        timeouts = self._session.timeouts
        command = self._left.popleft()
        self._connection.expect(1, timeouts.command if self._left else timeouts.data, self._on_command)
        self._connection.write(command)

    def _on_command(self, replies: list[Reply]) -> None:
        self._replies += replies
        if self._left and self._connection.lost is None and replies[0].ok:
            self._write_command()
        else:
            self._on_envelope(self._replies)

    def _on_reset(self, replies: list[Reply]) -> None:
        """Take the reply to the RSET before an envelope."""
        connection, session = self._connection, self._session
        done = bool(replies) and replies[0].ok
        if not self._reached and not done and (replies or connection.timed_out):
            session.memory.chains = False
        self._conclude_by_close()
        if self.mail is not None and replies and not done:
            # It concerns the session, never this mail.
            self.return_mail(str(replies[0]))
        elif not done:
            if not session.pipelining:
                self._on_envelope([])
        elif not session.pipelining:
            self._write_command()
        elif not self._reached:
            self._reached = True

    def _on_envelope(self, replies: list[Reply]) -> None:
        """Take the replies to MAIL, RCPT and DATA.

        The first one that is not the expected one decides. Those after it only follow from it.
        """
        mail, session, connection = self.mail, self._session, self._connection
        if mail is None or mail.state is not MailState.ENVELOPE:
            return
        if len(replies) == 3 and replies[0].ok and replies[1].ok and replies[2].intermediate:
            session.needs_reset = False
            self._write_message(mail)
            return
        stopped = next((i for i, r in enumerate(replies) if not (r.intermediate if i == 2 else r.ok)), None)
        if stopped is None:
            if not replies and not session.fresh and not (connection.timed_out and self._reached):
                self._try_again(mail)
                return
            phase = Phase.DATA if len(replies) == 2 else Phase.ENVELOPE
            cause, step = connection.lost or "no answer", _STEPS[len(replies)]
            self._end(NotSent(phase, cause, False, session.name, connection.unparsed, step))
            return
        reply = replies[stopped]
        if stopped == 0 and reply.code == 503:
            # MAIL out of sequence: that concerns the session, never this mail.
            connection.abort(str(reply))
            if not session.fresh:
                self._try_again(mail)
                return
        session.needs_reset = True
        refusal = (Phase.DATA if stopped == 2 else Phase.ENVELOPE, _STEPS[stopped], reply)
        if stopped < 2 < len(replies) and replies[2].intermediate and connection.lost is None:
            # RFC 2920 §3.1: a server that accepts DATA without a recipient gets a lone dot.
            self._refusal = refusal
            connection.expect(1, session.timeouts.command, self._on_lone_dot)
            connection.write(b".\r\n")
        else:
            self._refuse(*refusal)

    def _on_lone_dot(self, replies: list[Reply]) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            self._refuse(*refusal)

    def _try_again(self, mail: OutgoingMail) -> None:
        self.mail = None
        self._source.try_again(mail)

    # --- The message

    def _write_message(self, mail: OutgoingMail) -> None:
        session, connection, timeouts = self._session, self._connection, self._session.timeouts
        if connection.lost is not None:
            cause, unparsed = connection.lost, connection.unparsed
            self._end(NotSent(Phase.DATA, cause, False, session.name, unparsed, TransactionStep.MESSAGE))
            return
        if not mail.guard():
            # After a 354 the client can only send the message or end the connection.
            connection.abort("lease lost")
            self._end(LeaseLost(Phase.DATA))
            return
        mail.state = MailState.MESSAGE
        message, end = stuffed(mail.message)
        connection.expect(1, timeouts.after_dot, self._on_message, lenient=True)
        flush_timeout = timeouts.block + len(message) / _SLOWEST
        self._written_at = asyncio.get_running_loop().time()
        if len(message) > _SMALL:
            connection.write(message, end, flush_timeout=flush_timeout)
            return
        following = self._chain() if session.prompt and session.pipelining else b""
        data = b"".join((message, end, following))
        connection.write(data, flush_timeout=flush_timeout, followed=bool(following))

    def _chain(self) -> bytes:
        """Take the next mail, if one may follow; return its envelope."""
        session = self._session
        mail = self._source.next_to_chain(session) if session.memory.chains else None
        if mail is None:
            return b""
        envelope = commands(session, mail)
        if isinstance(envelope, Rejected) or not mail.guard():
            # It has its result once a session is free.
            return b""
        self._source.chain(mail)
        self._take(mail)
        self.chained = mail
        # A server that loses the commands behind a message never answers RSET.
        self._connection.expect(1, session.timeouts.quit, self._on_reset)
        self._connection.expect(3, session.timeouts.command, self._on_envelope)
        return b"RSET\r\n" + envelope

    def _on_message(self, replies: list[Reply]) -> None:
        session, connection = self._session, self._connection
        if not replies:
            cause, unparsed = connection.lost or "no answer", connection.unparsed
            if connection.unsent:
                step = TransactionStep.MESSAGE
                self._end(NotSent(Phase.DATA, cause, False, session.name, unparsed, step))
            else:
                self._end(InDoubt(cause, session.name, unparsed))
            return
        reply = replies[0]
        session.prompt = asyncio.get_running_loop().time() - self._written_at < _PROMPT
        # Postfix keeps the transaction open when it refuses the message, and then accepts no MAIL.
        session.needs_reset = not reply.ok
        if connection.unsent:
            self._refuse(Phase.DATA, TransactionStep.MESSAGE, reply)
        elif reply.ok:
            self._end(Sent(str(reply), session.name))
        elif reply.intermediate:
            cause = f"out of step: {reply}"
            self._end(InDoubt(cause, session.name, str(reply)), abort=cause)
        else:
            self._refuse(Phase.AFTER_DOT, TransactionStep.MESSAGE, reply)

    # --- A refusal

    def _refuse(self, phase: Phase, step: TransactionStep, reply: Reply) -> None:
        """End the mail with this reply, which may concern the mail, the session or the account."""
        session, connection = self._session, self._connection
        if not (reply.transient or reply.permanent):
            connection.abort(f"out of step: {reply}")
            self._end(NotSent(phase, f"out of step: {reply}", False, session.name, str(reply), step))
            return
        mail_from = self.mail.mail_from if self.mail is not None else ""
        about = refusal_scope(step, reply, mail_from)
        self._refusal = (phase, step, reply)
        if about is not RefusalScope.MAIL or not reply.transient:
            self._conclude(about)
        elif connection.lost is not None:
            self._conclude_by_close()
        elif not connection.pending:
            # RSET shows whether the server closed the connection with the refusal.
            connection.expect(1, session.timeouts.quit, self._on_closed_or_reset)
            connection.write(b"RSET\r\n")
        # Otherwise the RSET of the envelope behind the message shows it.

    def _on_closed_or_reset(self, replies: list[Reply]) -> None:
        self._session.needs_reset = not (replies and replies[0].ok)
        self._conclude_by_close()

    def _conclude_by_close(self) -> None:
        """End a mail whose refusal concerns the session if the server closed the connection with it."""
        connection = self._connection
        closed = connection.lost not in (None, _CANCELLED) and not connection.timed_out
        if self._refusal is not None:
            _, step, reply = self._refusal
            mail_from = self.mail.mail_from if self.mail is not None else ""
            self._conclude(refusal_scope(step, reply, mail_from, closed=closed))

    def _conclude(self, about: RefusalScope) -> None:
        assert self._refusal is not None
        (phase, step, reply), self._refusal = self._refusal, None
        if about is RefusalScope.ACCOUNT:
            self._end(NotSent(phase, str(reply), True, self._session.name, step=step))
            return
        hint, about_session = retry_hint(reply), about is RefusalScope.SESSION
        self._end(Rejected(phase, str(reply), reply.permanent, hint, self._session.name, about_session, step))

    def _end(self, result: SendResult, *, abort: str = "") -> None:
        mail, self.mail, self.chained = self.mail, self.chained, None
        assert mail is not None
        following = self.mail
        if following is not None:
            self._reached = False
            self._source.reached(following)
        if self._dropped:
            self._dropped, abort = False, abort or "the next mail went on another session"
        if abort:
            self.return_mail(abort)
        self._source.finish(self._session, mail, result)

    def return_mail(self, cause: str) -> None:
        """Abort the connection, for a reason that does not concern the mail whose envelope was written."""
        mail, self.mail = self.mail, None
        self._connection.abort(cause)
        if mail is not None:
            self._source.try_again(mail)
