"""The mail server and the DNS of a schedule, and the services' clients of both.

The plan says how each delivery to a task's recipient ends:

- `ok`, `slow`, `hang`     taken; the reply comes at once, after 6 s, after 45 s
- `reject`, `reject_after_dot`   550 to RCPT, 554 to the message
- `defer`, `defer_slow`    451 to RCPT, at once or after 25 s
- `drop_before`            the connection ends before the last byte of the message
- `kept_unheard`           taken, and the connection ends before the reply
- `lost_unheard`           not taken, and the connection ends before the reply
- `torn`                   taken, but the message leaves in two parts with a wait between
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.sender import replies
from services.sender.replies import InDoubt, LeaseLost, NotSent, Phase, Rejected, Sent
from services.sender.smtp_mail import OutgoingMail
from services.validator.mx import Reason, Verdict, VerdictKind
from tests.simulation.loop import Loop
from tests.simulation.world import World

__all__ = ["Copy", "Dns", "MailServer", "Pool"]

_RELAY = "relay:25"


@dataclass(frozen=True, slots=True)
class Copy:
    """A message that the server took, with its task and the owner token of its claim."""

    task: bytes
    message_id: str
    owner: bytes
    at: float
    process: str


class MailServer:
    """Takes or refuses mail by recipient (`t<number>@...`), and keeps the journal."""

    def __init__(self, world: World, ends: dict[str, tuple[str, ...]]) -> None:
        self.world = world
        self.journal: list[Copy] = []
        self.unheard: set[bytes] = set()
        """The owner tokens of the claims whose replies were lost."""
        self._ends = {rcpt: list(planned) for rcpt, planned in ends.items()}

    def end(self, rcpt: str) -> str:
        """Return how the next delivery to this recipient ends."""
        ends = self._ends[rcpt]
        return ends.pop(0) if len(ends) > 1 else ends[0]

    def accept(self, copy: Copy, loop: Loop) -> None:
        """Take a message and write it to the journal."""
        self.journal.append(copy)
        self.world.trace("relay", f"takes task {copy.task[-2]} from {loop.process.name}")
        self.world.operation("mail", loop.process)


class Pool:
    """The part of the SMTP client that the sender's stage uses."""

    def __init__(self, server: MailServer) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._server, self._loop = server, loop
        self._world = server.world
        self._mark_down = False
        self._sends: dict[OutgoingMail, asyncio.Task[None]] = {}
        self._handed_over: set[OutgoingMail] = set()

    @property
    def available(self) -> bool:
        """False from the failure to reach the relay to its return."""
        return not self._mark_down

    async def wait_available(self) -> None:
        """Wait for the relay."""
        while self._mark_down:
            await asyncio.sleep(0.5)
            self._mark_down = not self._world.up("relay")

    def submit(self, mail: OutgoingMail) -> None:
        """Send one mail."""
        self._sends[mail] = self._loop.create_task(self._send(mail))

    def withdraw(self, mail: OutgoingMail) -> bool:
        """Take a mail back unless it is being handed over."""
        if mail not in self._sends or mail in self._handed_over:
            return False
        self._sends.pop(mail).cancel()
        return True

    def cut_off(self, mail: OutgoingMail) -> None:
        """End the exchange of a mail that is being handed over."""
        if mail in self._handed_over:
            self._sends[mail].cancel()

    async def _send(self, mail: OutgoingMail) -> None:
        result = await self._begin(mail.rcpt, mail.guard)
        if isinstance(result, str):
            self._handed_over.add(mail)
            result = await self._hand_over(result, mail.message, mail.guard)
            self._handed_over.discard(mail)
        if self._sends.pop(mail, None) is not None:
            mail.on_result(result)

    async def _begin(self, rcpt: str, guard: Callable[[], bool]) -> replies.SendResult | str:
        """Send the envelope. Return its result, or how the delivery ends if the server wants the message."""
        latency = self._world.scheduler.latency
        await asyncio.sleep(latency())
        if self._lost():
            self._mark_down = True
            return NotSent(Phase.CONNECT, "connection refused", True, _RELAY)
        if not guard():
            return LeaseLost(Phase.ENVELOPE)
        end = self._server.end(rcpt)
        self._world.trace(self._loop.process.name, f"sends to {rcpt}: {end}")
        await asyncio.sleep(25.0 if end == "defer_slow" else latency())
        if self._lost():
            return NotSent(Phase.ENVELOPE, "connection lost", False, _RELAY)
        if end in ("defer", "defer_slow"):
            return Rejected(Phase.ENVELOPE, "451 4.7.1 greylisted", False, None, _RELAY)
        if end == "reject":
            return Rejected(Phase.ENVELOPE, "550 5.1.1 no such user", True, None, _RELAY)
        return end

    async def _hand_over(self, end: str, message: bytes, guard: Callable[[], bool]) -> replies.SendResult:
        latency = self._world.scheduler.latency
        owner = _owner(guard)
        handed_over = False
        try:
            if not guard():
                return LeaseLost(Phase.DATA)
            if end == "torn":
                await asyncio.sleep(3.0)
            if end == "drop_before" or self._lost():
                return NotSent(Phase.DATA, "connection lost", False, _RELAY)
            handed_over = True
            if end not in ("lost_unheard", "reject_after_dot"):
                # What is in the socket arrives, even if the sender dies.
                process = self._loop.process.name
                copy = Copy(_task(message), _message_id(message), owner, self._world.now, process)
                self._world.scheduler.after(latency(), None, self._server.accept, copy, self._loop)
            await asyncio.sleep({"slow": 6.0, "hang": 45.0}.get(end, 0.005) + latency())
            if end in ("kept_unheard", "lost_unheard") or self._lost():
                self._server.unheard.add(owner)
                return InDoubt("connection lost", _RELAY)
            if end == "reject_after_dot":
                return Rejected(Phase.AFTER_DOT, "554 5.7.1 refused", True, None, _RELAY)
            return Sent("250 2.0.0 queued", _RELAY)
        except asyncio.CancelledError:
            if handed_over:
                return InDoubt("cancelled", _RELAY)
            return NotSent(Phase.DATA, "cancelled", False, _RELAY)

    def _lost(self) -> bool:
        return not self._world.up("relay")


def _message_id(message: bytes) -> str:
    start = message.index(b"Message-ID: ") + 12
    return message[start : message.index(b"\r\n", start)].decode()


def _task(message: bytes) -> bytes:
    return bytes.fromhex(_message_id(message)[1:].partition("@")[0].replace("-", ""))


def _owner(guard: Callable[[], bool]) -> bytes:
    lease = getattr(guard, "__self__", None)
    return lease.row.owner if lease is not None else b""


class Dns:
    """Looks up domains (`d<number>.test`). The plan says what each lookup finds."""

    def __init__(self, world: World, finds: dict[str, tuple[str, ...]]) -> None:
        self._world = world
        self._finds = {domain: list(planned) for domain, planned in finds.items()}

    async def __call__(self, domain: str, fresh: bool) -> Verdict:
        """Return the verdict on a domain."""
        await asyncio.sleep(self._world.scheduler.latency(0.02))
        finds = self._finds[domain]
        found = finds.pop(0) if len(finds) > 1 else finds[0]
        if found == "ok":
            return Verdict(VerdictKind.OK, None, ((10, f"mx.{domain}"),), "", 300)
        if found == "none":
            return Verdict(VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN, (), domain, 60)
        return Verdict(VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, (), "SERVFAIL", 30)
