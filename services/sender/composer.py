"""Writes a task's mail: its envelope and its message. Pure."""

from __future__ import annotations

from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import deliveries, widths
from services.common.header_fields import mailbox
from services.sender.headers import address
from services.sender.message import build
from services.sender.smtp_mail import check_mail

__all__ = ["ComposedMail", "Composer"]

_MAX_MESSAGE_ID = widths(deliveries)["message_id"]


class ComposedMail(NamedTuple):
    """The return path, the recipient, and the message with CRLF line ends."""

    mail_from: str
    rcpt: str
    message: bytes


class Composer:
    """Writes mails from one mailbox, that of `EMAIL_FROM` (RFC 5322 section 3.4).

    Raises ValueError for a mailbox that no mail can come from: each task would fail as unsendable.
    """

    def __init__(self, email_from: str) -> None:
        self._name, spec = mailbox(email_from)
        self._address = address(spec)
        self._domain = spec.rpartition("@")[2]
        # The database would cut a longer Message-ID, and a later attempt would have another one than the
        # first.
        if (over := len(self.message_id(bytes(16))) - _MAX_MESSAGE_ID) > 0:
            raise ValueError(f"the address's domain must have {len(self._domain) - over} characters at most")
        trial = pb.MxOk(task=pb.MailTask(id=bytes(16), email=self._address, body=""))
        check_mail(*self.compose(trial, self.message_id(trial.task.id)))

    def message_id(self, task_id: bytes) -> str:
        """Return the Message-ID of a task's mail, which is the same in every attempt."""
        # As str(UUID(bytes=task_id)), at a quarter of its time.
        h = task_id.hex()
        return f"<{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}@{self._domain}>"

    def compose(self, event: pb.MxOk, message_id: str) -> ComposedMail:
        """Return the mail of the event's task, which is the same in every attempt of its epoch.

        Its Date is the latest of three times: when the task was recorded, scheduled for, and reopened. Raises
        ValueError if the task can never become a mail. The pool checks the envelope's grammar.
        """
        task = event.task
        rcpt, domain = task.email, task.domain
        if domain and not rcpt.endswith("@" + domain):
            rcpt = f"{rcpt.rpartition('@')[0]}@{domain}"
        message = build(
            message_id=message_id,
            from_addr=self._address,
            from_name=self._name,
            to_addr=rcpt,
            subject=task.subject,
            # Not the event's own time, which changes when the task is validated again.
            date=max(task.created_at_us, event.send_at_us, event.epoch * 1000) / 1e6,
            text=task.body or ("" if task.HasField("body") else None),
            html=task.html or ("" if task.HasField("html") else None),
            headers=task.headers,
        )
        return ComposedMail(self._address, rcpt, message)
