"""The recipients of the load, and the status in which a task to each must end. Pure."""

from __future__ import annotations

import random

__all__ = ["end_of", "recipient"]

# How many of a hundred mails each gets.
_MIX: dict[str, int] = {
    "u{n}@d{d}.ok.test": 85,
    "greylist+{n}@d{d}.ok.test": 2,
    "greylist-2+{n}@d{d}.ok.test": 1,
    "drop-before+{n}@d{d}.ok.test": 1,
    "drop-after+{n}@d{d}.ok.test": 1,
    "drop-lost+{n}@d{d}.ok.test": 1,
    "slow-400+{n}@d{d}.ok.test": 2,
    "slow-25000+{n}@d{d}.ok.test": 1,
    "u{n}@x{n}.flaky-1.test": 2,
    "reject5+{n}@d{d}.ok.test": 1,
    "data5+{n}@d{d}.ok.test": 1,
    "u{n}@nowhere.test": 1,
    "u{n}@nullmx.test": 1,
}


def recipient(number: int, rng: random.Random) -> str:
    """Return an address for the client's task `number`."""
    (template,) = rng.choices(list(_MIX), list(_MIX.values()))
    return template.format(n=number, d=number % 50)


def end_of(email: str) -> str:
    """Return the status in which a task to this address must end."""
    local, _, domain = email.partition("@")
    refused = local.startswith(("reject5", "data5")) or domain in ("nowhere.test", "nullmx.test")
    return "failed" if refused else "completed"
