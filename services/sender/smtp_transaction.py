"""One mail over one session: the envelope, the message and the reply (RFC 5321 §3.3, RFC 2920)."""

import asyncio
import re
from collections.abc import Callable

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
from services.sender.smtp_session import Session

__all__ = ["StaleSessionError", "begin", "check_mail", "send_message"]

_COMMANDS = (TransactionStep.MAIL, TransactionStep.RCPT, TransactionStep.DATA)
_ADDRESS = re.compile(r"[^\x00-\x20\x7f-\xa0<>\u2028\u2029]*")
_SLOWEST = 10_000  # bytes a second: a message may leave no slower


class StaleSessionError(Exception):
    """An idle session ended before the server answered MAIL: the pool may try another one at once."""


def check_mail(mail_from: str, rcpt: str, message: bytes) -> None:
    """Refuse a mail that would break out of its command or its message (SMTP smuggling, RFC 5321 §2.3.8).

    Raises:
        ValueError: there is no recipient, or the message has a CR or LF outside a CRLF. Or an address has a
            space, a control character or an angle bracket.
    """
    if not _ADDRESS.fullmatch(mail_from) or not _ADDRESS.fullmatch(rcpt) or not rcpt:
        raise ValueError(f"not an envelope: {mail_from!r} to {rcpt!r}")
    if not message.count(b"\r\n") == message.count(b"\n") == message.count(b"\r"):
        raise ValueError("the message has line ends that are not CRLF")


async def begin(
    session: Session, mail_from: str, rcpt: str, message: bytes, guard: Callable[[], bool]
) -> SendResult | None:
    """Send the envelope of a mail that ``check_mail`` accepted, up to the reply to DATA.

    Args:
        mail_from: the return path; empty for the null path.
        guard: called before the envelope is written; on False nothing is sent.

    Returns:
        None if the server wants the message, which ``send_message`` sends; otherwise how the send ended.

    Raises:
        StaleSessionError: nothing was sent, and the session is over.
        asyncio.CancelledError: no message was sent, and the session is over.
    """
    parameters = _parameters(session, mail_from, rcpt, message)
    if isinstance(parameters, Rejected):
        return parameters
    if not guard():
        return LeaseLost(Phase.ENVELOPE)
    session.mails += 1
    commands = [
        f"MAIL FROM:<{mail_from}>{parameters}\r\n".encode(),
        f"RCPT TO:<{rcpt}>\r\n".encode(),
        b"DATA\r\n",
    ]
    if session.needs_reset:
        commands.insert(0, b"RSET\r\n")
    return await _envelope(session, commands, mail_from)


async def send_message(
    session: Session, mail_from: str, message: bytes, guard: Callable[[], bool]
) -> SendResult:
    """Send the message after ``begin`` returned None; return how the send ended.

    Args:
        mail_from: as for ``begin``.
        guard: called before the message is written; on False nothing is sent.

    Cancelling aborts the connection. The result then says whether the message may have gone out.
    """
    connection, timeouts = session.connection, session.timeouts
    if connection.lost is not None:
        return NotSent(
            Phase.DATA, connection.lost, False, session.name, connection.unparsed, TransactionStep.MESSAGE
        )
    if not guard():
        # After a 354 the client can only send the message or end the connection.
        connection.abort("lease lost")
        return LeaseLost(Phase.DATA)
    try:
        replies = await connection.ask(
            _stuffed(message),
            1,
            timeouts.after_dot,
            flush_timeout=timeouts.block + len(message) / _SLOWEST,
            lenient=True,
        )
    except asyncio.CancelledError:
        replies = connection.replies
    return await _message_result(session, mail_from, replies)


def _parameters(session: Session, mail_from: str, rcpt: str, message: bytes) -> str | Rejected:
    """Return MAIL's parameters, or the refusal if this server cannot take this mail at all."""
    offered = session.extensions
    parameters = ""
    if "SIZE" in offered:
        limit = session.size_limit
        if limit is not None and len(message) > limit:
            return _never(
                session, f"552 5.3.4 message of {len(message)} bytes, the relay takes {limit} at most"
            )
        parameters = f" SIZE={len(message)}"
    if not (message.isascii() and mail_from.isascii() and rcpt.isascii()):
        header = message[: message.find(b"\r\n\r\n") + 1 or None]
        if not (mail_from.isascii() and rcpt.isascii() and header.isascii()):
            if "SMTPUTF8" not in offered:
                return _never(session, "550 5.6.7 the relay does not take non-ASCII addresses (SMTPUTF8)")
            parameters += " SMTPUTF8"
        if "8BITMIME" not in offered:
            return _never(session, "554 5.6.3 the relay does not take 8-bit messages (8BITMIME)")
        parameters += " BODY=8BITMIME"
    return parameters


def _never(session: Session, reply: str) -> Rejected:
    return Rejected(Phase.ENVELOPE, reply, True, None, session.name)


async def _envelope(session: Session, commands: list[bytes], mail_from: str) -> SendResult | None:
    """Send the commands; return None after a 354, otherwise how the send ended.

    The first reply that is not the expected one decides. Replies to commands that were pipelined after it
    only follow from it.
    """
    connection, timeouts = session.connection, session.timeouts
    pipelined = "PIPELINING" in session.extensions
    replies: list[Reply] = []
    if pipelined:
        replies = await connection.ask(b"".join(commands), len(commands), timeouts.command)
    else:
        for command in commands:
            limit = timeouts.data if command is commands[-1] else timeouts.command
            replies += await connection.ask(command, 1, limit)
            if connection.lost is not None or not replies[-1].ok:
                break
    last = len(commands) - 1
    mail = last - 2
    stopped = next((i for i, r in enumerate(replies) if not (r.intermediate if i == last else r.ok)), None)
    if stopped is None:
        if len(replies) > last:
            session.needs_reset = False
            return None
        if not replies and not session.fresh and not connection.timed_out:
            raise StaleSessionError(connection.lost)
        phase = Phase.DATA if len(replies) == last else Phase.ENVELOPE
        step = _COMMANDS[max(len(replies) - mail, 0)]
        return NotSent(phase, connection.lost or "no answer", False, session.name, connection.unparsed, step)
    reply = replies[stopped]
    if stopped < mail or (stopped == mail and reply.code == 503):
        # The server refused RSET, or MAIL as out of sequence. That concerns the session, never this mail.
        connection.abort(str(reply))
        if not session.fresh:
            raise StaleSessionError(str(reply))
    session.needs_reset = True
    if pipelined and stopped < last < len(replies) and replies[last].intermediate:
        # RFC 2920 §3.1: a server that accepts DATA without a recipient gets a lone dot.
        await connection.ask(b".\r\n", 1, timeouts.command)
    phase = Phase.DATA if stopped == last else Phase.ENVELOPE
    return await _refusal(session, phase, _COMMANDS[stopped - mail], reply, mail_from)


async def _refusal(
    session: Session, phase: Phase, step: TransactionStep, reply: Reply, mail_from: str
) -> SendResult:
    """Return how the send ended with this reply, which may concern the mail, the session or the account."""
    if not (reply.transient or reply.permanent):
        session.connection.abort(f"out of step: {reply}")
        return NotSent(phase, f"out of step: {reply}", False, session.name, str(reply), step)
    about = refusal_scope(step, reply, mail_from)
    if about is RefusalScope.MAIL and reply.transient:
        try:
            about = refusal_scope(step, reply, mail_from, closed=await _closed(session))
        except asyncio.CancelledError:
            # After the dot the reply counts, even if nobody waits for the one to RSET.
            if phase is not Phase.AFTER_DOT:
                raise
    if about is RefusalScope.ACCOUNT:
        return NotSent(phase, str(reply), True, session.name, step=step)
    hint = retry_hint(reply)
    return Rejected(
        phase, str(reply), reply.permanent, hint, session.name, about is RefusalScope.SESSION, step
    )


async def _closed(session: Session) -> bool:
    """Return whether the server closed the connection with its last reply; RSET shows it."""
    connection = session.connection
    if connection.lost is None:
        replies = await connection.ask(b"RSET\r\n", 1, session.timeouts.quit)
        session.needs_reset = not (replies and replies[0].ok)
    return connection.lost is not None and not connection.timed_out


async def _message_result(session: Session, mail_from: str, replies: list[Reply]) -> SendResult:
    """Return how the send ended, given the reply to the message, if any."""
    connection = session.connection
    if not replies:
        cause = connection.lost or "no answer"
        if connection.unsent:
            return NotSent(
                Phase.DATA, cause, False, session.name, connection.unparsed, TransactionStep.MESSAGE
            )
        return InDoubt(cause, session.name, connection.unparsed)
    reply = replies[0]
    # Postfix keeps the transaction open when it refuses the message, and then accepts no MAIL.
    session.needs_reset = not reply.ok
    if connection.unsent:
        return await _refusal(session, Phase.DATA, TransactionStep.MESSAGE, reply, mail_from)
    if reply.ok:
        return Sent(str(reply), session.name)
    if reply.intermediate:
        connection.abort(f"out of step: {reply}")
        return InDoubt(f"out of step: {reply}", session.name, str(reply))
    return await _refusal(session, Phase.AFTER_DOT, TransactionStep.MESSAGE, reply, mail_from)


def _stuffed(message: bytes) -> bytes:
    """Return the message for DATA: leading dots doubled (RFC 5321 §4.5.2), a lone dot at the end."""
    if b"\r\n." in message:
        message = message.replace(b"\r\n.", b"\r\n..")
    if message[:1] == b".":
        message = b"." + message
    return message + (b".\r\n" if message[-2:] == b"\r\n" else b"\r\n.\r\n")
