"""One SMTP session (RFC 5321) as an asyncio Protocol, with PIPELINING and with the faults.

The session handles bytes as they come: it answers in one piece what a pipelining client sends in one piece.
"""

import asyncio
import base64
import binascii
import hmac
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from deploy.local.catcher.control import Control
from deploy.local.catcher.faults import Fault
from deploy.local.catcher.journal import Journal

__all__ = ["CatcherSettings", "SmtpSession"]

MAX_LINE = 2048
_PATH = re.compile(r"(?:FROM|TO):\s*<([^>]*)>\s*(.*)", re.IGNORECASE)
_SIZE = re.compile(r"\bSIZE=(\d+)", re.IGNORECASE)


@dataclass(slots=True)
class CatcherSettings:
    """What all sessions of one catcher share."""

    journal: Journal
    control: Control
    user: str = ""
    password: str = ""
    tls: ssl.SSLContext | None = None
    max_size: int = 10 << 20
    open: set["SmtpSession"] = field(default_factory=set)


class SmtpSession(asyncio.Protocol):
    """One client's session, from the banner to the end of the connection."""

    def __init__(self, settings: CatcherSettings) -> None:
        self._settings = settings
        self._buffer = bytearray()
        self._scanned = 0
        self._out: list[bytes] = []
        self._in_data = False
        self._too_large = False
        self._waiting = False
        self._encrypted = False
        self._authenticated = not settings.user
        self._login: Callable[[str], None] | None = None
        self._reset()

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the greeting, unless the control file orders something else."""
        self._transport = cast(asyncio.Transport, transport)
        if self._encrypted:
            return
        self._settings.open.add(self)
        connect = self._settings.control.refresh().connect
        if connect == "hang":
            self._waiting = True
        elif connect == "421":
            self._transport.write(b"421 4.3.2 Not now\r\n")
            self._transport.close()
        elif connect == "refuse":
            self._transport.abort()
        else:
            self._transport.write(b"220 catcher.post.test ESMTP\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what the client had not finished."""
        self._waiting = True
        self._settings.open.discard(self)

    def abort(self) -> None:
        """Cut the connection, as a crashing server does."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Handle all complete commands."""
        self._buffer += data
        self._go_on()

    def _go_on(self) -> None:
        while not self._waiting and (self._take_message() if self._in_data else self._take_line()):
            pass
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    def _close(self) -> None:
        """Send the pending replies and close."""
        self._transport.write(b"".join(self._out))
        self._out.clear()
        self._waiting = True
        self._transport.close()

    # Commands

    def _take_line(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_LINE:
                self._out.append(b"500 5.5.2 Line too long\r\n")
                self._close()
            return False
        line = self._buffer[:end].decode("utf-8", "replace")
        del self._buffer[: end + 2]
        if self._login:
            step, self._login = self._login, None
            step(line)
            return True
        verb, _, rest = line.partition(" ")
        command = COMMANDS.get(verb.upper())
        if command is None:
            self._out.append(b"500 5.5.2 What?\r\n")
        else:
            command(self, rest)
        return True

    def _reset(self) -> None:
        self._mail_from: str | None = None
        self._recipients: list[str] = []
        self._fault: Fault | None = None

    def _ehlo(self, rest: str) -> None:
        self._reset()
        offers = [b"catcher.post.test", b"PIPELINING", b"SIZE %d" % self._settings.max_size, b"8BITMIME"]
        offers += [b"SMTPUTF8", b"ENHANCEDSTATUSCODES"]
        if self._settings.tls and not self._encrypted:
            offers.append(b"STARTTLS")
        if self._settings.user:
            offers.append(b"AUTH PLAIN LOGIN")
        self._out += [b"250-%s\r\n" % offer for offer in offers[:-1]]
        self._out.append(b"250 %s\r\n" % offers[-1])

    def _helo(self, rest: str) -> None:
        self._reset()
        self._out.append(b"250 catcher.post.test\r\n")

    def _mail(self, rest: str) -> None:
        orders = self._settings.control.refresh()
        match = _PATH.match(rest)
        if orders.mail:
            self._out.append(orders.mail)
        elif not self._authenticated:
            self._out.append(b"530 5.7.0 Authentication required\r\n")
        elif self._mail_from is not None:
            self._out.append(b"503 5.5.1 Nested MAIL\r\n")
        elif match is None:
            self._out.append(b"501 5.5.4 MAIL FROM:<address>\r\n")
        elif (size := _SIZE.search(match[2])) and int(size[1]) > self._settings.max_size:
            self._out.append(b"552 5.3.4 Message too large\r\n")
        else:
            self._mail_from = match[1]
            self._out.append(b"250 2.1.0 OK\r\n")

    def _rcpt(self, rest: str) -> None:
        match = _PATH.match(rest)
        if self._mail_from is None:
            self._out.append(b"503 5.5.1 MAIL first\r\n")
            return
        if match is None or not match[1]:
            self._out.append(b"501 5.5.4 RCPT TO:<address>\r\n")
            return
        fault = self._settings.control.fault(match[1])
        if fault and fault.name in {"reject4", "reject5", "greylist", "shut421"}:
            # As most servers do, the catcher quotes the recipient.
            code, enhanced, text = fault.reply.split(b" ", 2)
            self._out.append(b"%b %b <%b>: %b" % (code, enhanced, match[1].encode(), text))
            if fault.name == "shut421":
                self._close()
            return
        self._fault = fault or self._fault
        self._recipients.append(match[1])
        self._out.append(b"250 2.1.5 OK\r\n")

    def _data(self, rest: str) -> None:
        if not self._recipients:
            self._out.append(b"554 5.5.1 No valid recipients\r\n")
        elif self._fault and self._fault.name == "drop-before":
            self._close()
        else:
            self._in_data, self._scanned, self._too_large = True, 0, False
            self._out.append(b"354 Go on\r\n")

    def _rset(self, rest: str) -> None:
        self._reset()
        self._out.append(b"250 2.0.0 OK\r\n")

    def _noop(self, rest: str) -> None:
        self._out.append(b"250 2.0.0 OK\r\n")

    def _vrfy(self, rest: str) -> None:
        self._out.append(b"252 2.5.0 Send some mail, I'll try my best\r\n")

    def _quit(self, rest: str) -> None:
        self._out.append(b"221 2.0.0 Bye\r\n")
        self._close()

    # The message

    def _take_message(self) -> bool:
        buffer = self._buffer
        if self._scanned == 0 and buffer.startswith(b".\r\n"):
            end, length = 0, 3
        else:
            # The end of the message may be split over two pieces.
            end, length = buffer.find(b"\r\n.\r\n", max(0, self._scanned - 4)), 5
            if end < 0:
                if len(buffer) > self._settings.max_size:
                    self._too_large = True
                    del buffer[:-4]
                self._scanned = len(buffer)
                return False
            end += 2
            length = 3
        message = bytes(buffer[:end])
        del buffer[: end + length]
        self._in_data = False
        if self._too_large or len(message) > self._settings.max_size:
            self._reset()
            self._out.append(b"552 5.3.4 Message too large\r\n")
            return True
        if message.startswith(b"."):
            message = message[1:]
        self._finish(message.replace(b"\r\n.", b"\r\n"))
        return True

    def _finish(self, message: bytes) -> None:
        fault, mail_from, recipients = self._fault, self._mail_from or "", self._recipients
        self._reset()
        name = fault.name if fault else ""
        if name in {"data4", "data5"}:
            assert fault
            self._out.append(fault.reply)
        elif name == "hang":
            self._waiting = True
        elif name == "drop-lost":
            self._close()
        else:
            self._waiting = True
            self._settings.journal.add((mail_from, recipients, message, lambda kept: self._kept(kept, fault)))

    def _kept(self, kept: bool, fault: Fault | None) -> None:
        if self._transport.is_closing():
            return
        if fault and fault.name == "drop-after":
            self._close()
        elif fault and fault.name == "slow":
            asyncio.get_running_loop().call_later(fault.milliseconds / 1000, self._answer, kept)
        else:
            self._answer(kept)

    def _answer(self, kept: bool) -> None:
        if self._transport.is_closing():
            return
        self._out.append(b"250 2.0.0 Kept\r\n" if kept else b"452 4.3.1 No space\r\n")
        self._waiting = False
        self._go_on()

    # STARTTLS (RFC 3207) and AUTH (RFC 4954)

    def _starttls(self, rest: str) -> None:
        if not self._settings.tls or self._encrypted:
            self._out.append(b"502 5.5.1 No TLS here\r\n")
            return
        # Commands from before the handshake must not count after it (RFC 3207, section 6).
        self._buffer.clear()
        self._waiting = True
        self._transport.write(b"220 2.0.0 Go on\r\n")
        self._upgrade = asyncio.get_running_loop().create_task(self._encrypt(self._settings.tls))

    async def _encrypt(self, context: ssl.SSLContext) -> None:
        self._encrypted = True
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self._transport, self, context, server_side=True, ssl_handshake_timeout=10
            )
        except (OSError, ssl.SSLError):
            self._transport.abort()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._authenticated = not self._settings.user
        self._reset()
        self._waiting = False
        self._go_on()

    def _auth(self, rest: str) -> None:
        mechanism, _, first = rest.partition(" ")
        if not self._settings.user or mechanism.upper() not in {"PLAIN", "LOGIN"}:
            self._out.append(b"504 5.5.4 No such mechanism\r\n")
        elif mechanism.upper() == "PLAIN":
            if first:
                self._plain(first)
            else:
                self._ask(b"", self._plain)
        elif first:
            self._login_user(first)
        else:
            self._ask(b"Username:", self._login_user)

    def _ask(self, prompt: bytes, step: Callable[[str], None]) -> None:
        self._out.append(b"334 %s\r\n" % base64.b64encode(prompt))
        self._login = step

    def _plain(self, text: str) -> None:
        parts = _decoded(text).split("\0")
        self._judge(parts[1], parts[2]) if len(parts) == 3 else self._judge("", "")

    def _login_user(self, text: str) -> None:
        user = _decoded(text)
        self._ask(b"Password:", lambda password: self._judge(user, _decoded(password)))

    def _judge(self, user: str, password: str) -> None:
        settings = self._settings
        order = settings.control.refresh().auth
        right = hmac.compare_digest(
            f"{user}\0{password}".encode(), f"{settings.user}\0{settings.password}".encode()
        )
        if order == "temporary":
            self._out.append(b"454 4.7.0 Try again later\r\n")
        elif order == "fail" or not right:
            self._out.append(b"535 5.7.8 Wrong user name or password\r\n")
        else:
            self._authenticated = True
            self._out.append(b"235 2.7.0 Welcome\r\n")


COMMANDS: dict[str, Callable[[SmtpSession, str], None]] = {
    "EHLO": SmtpSession._ehlo,
    "HELO": SmtpSession._helo,
    "MAIL": SmtpSession._mail,
    "RCPT": SmtpSession._rcpt,
    "DATA": SmtpSession._data,
    "RSET": SmtpSession._rset,
    "NOOP": SmtpSession._noop,
    "VRFY": SmtpSession._vrfy,
    "QUIT": SmtpSession._quit,
    "AUTH": SmtpSession._auth,
    "STARTTLS": SmtpSession._starttls,
}


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
