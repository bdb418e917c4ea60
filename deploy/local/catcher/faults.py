"""The faults that a recipient's local part orders. Pure.

`NAME@any.domain` and `NAME+anything@any.domain` mean the same. NAME is a row of TABLE. `-N` or `-always`
behind it says how many tries for one recipient fail (`reject4-2`, `drop-after-always`).
"""

import re
from dataclasses import dataclass

__all__ = ["TABLE", "Fault", "fault_named", "fault_of"]

ALWAYS = 0

# Name: (how many tries fail by default, 0 for all; what happens).
TABLE: dict[str, tuple[int, str]] = {
    "reject4": (ALWAYS, "450 at RCPT"),
    "reject5": (ALWAYS, "550 at RCPT"),
    "greylist": (1, "451 at RCPT"),
    "shut421": (ALWAYS, "421 at RCPT, then closes"),
    "data4": (ALWAYS, "451 to the message"),
    "data5": (ALWAYS, "554 to the message"),
    "hang": (ALWAYS, "never answers the message, takes nothing"),
    "drop-before": (1, "closes when DATA is asked for: nothing was taken and the client knows"),
    "drop-lost": (1, "reads the message, takes nothing, closes without an answer: in doubt"),
    "drop-after": (1, "takes the message, closes without an answer: in doubt, but delivered"),
    "slow": (ALWAYS, "slow-N answers the message after N milliseconds"),
}

REPLIES = {
    "reject4": b"450 4.2.1 Mailbox busy, try again later\r\n",
    "reject5": b"550 5.1.1 No such mailbox\r\n",
    "greylist": b"451 4.7.1 Greylisted, try again later\r\n",
    "shut421": b"421 4.3.2 Shutting down\r\n",
    "data4": b"451 4.3.0 Cannot take this now\r\n",
    "data5": b"554 5.6.0 Message refused\r\n",
}

_NAMED = re.compile(rf"({'|'.join(sorted(TABLE, key=len, reverse=True))})(?:-(\d{{1,6}}|always))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. The first `first` tries for a recipient fail, or all for 0; `milliseconds` is for `slow`."""

    name: str
    first: int = ALWAYS
    milliseconds: int = 0

    @property
    def reply(self) -> bytes:
        """The reply that replaces the right one; empty for a fault without a reply."""
        return REPLIES.get(self.name, b"")


def fault_named(text: str) -> Fault | None:
    """Return the fault that `text` names, such as `greylist-2`; None when it names none."""
    match = _NAMED.fullmatch(text)
    if match is None:
        return None
    name, number = match[1], match[2]
    if name == "slow":
        return Fault(name, milliseconds=int(number)) if number and number != "always" else None
    if number == "always":
        return Fault(name)
    return Fault(name, int(number) if number else TABLE[name][0])


def fault_of(recipient: str) -> Fault | None:
    """Return the fault that a recipient's address orders; None for an ordinary address."""
    return fault_named(recipient.rpartition("@")[0].partition("+")[0].lower())
