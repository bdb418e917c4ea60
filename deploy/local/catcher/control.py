"""The control file: how the catcher misbehaves, to everybody or to the recipients of a rule.

    {"connect": "ok" | "refuse" | "hang" | "421",
     "auth":    "ok" | "fail" | "temporary",
     "mail":    "451 4.3.2 Busy",
     "seed":    1,
     "rules":   [{"rcpt": "*@slow.test", "fault": "slow-500", "probability": 0.5}]}

`refuse` closes the port and all connections, `hang` accepts and stays silent, `mail` is the reply to every
MAIL. A rule's `fault` is a row of faults.TABLE. The first rule that matches the recipient counts, with its
probability; without one, the recipient's own name counts. Every key is optional, and so is the file.
"""

import fnmatch
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.catcher.faults import Fault, fault_named, fault_of

__all__ = ["Control", "Orders"]


@dataclass(frozen=True, slots=True)
class FaultRule:
    """A fault for the recipients that the glob `rcpt` matches, with a probability from 0 to 1."""

    rcpt: str
    fault: Fault
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Orders:
    """The content of the control file."""

    connect: str = "ok"
    auth: str = "ok"
    mail: bytes = b""
    rules: tuple[FaultRule, ...] = ()
    chance: random.Random = field(default_factory=random.Random)


def _fault_rule(text: dict[str, Any]) -> FaultRule:
    fault = fault_named(str(text["fault"]))
    if fault is None:
        raise ValueError(f"unknown fault {text['fault']!r}")
    return FaultRule(str(text.get("rcpt", "*")).lower(), fault, float(text.get("probability", 1)))


def _orders(text: dict[str, Any]) -> Orders:
    connect, auth = text.get("connect", "ok"), text.get("auth", "ok")
    if connect not in {"ok", "refuse", "hang", "421"} or auth not in {"ok", "fail", "temporary"}:
        raise ValueError(f"unknown connect {connect!r} or auth {auth!r}")
    mail = str(text.get("mail", ""))
    return Orders(
        connect=connect,
        auth=auth,
        mail=f"{mail}\r\n".encode() if mail else b"",
        rules=tuple(_fault_rule(rule) for rule in text.get("rules", ())),
        chance=random.Random(text.get("seed")),
    )


class Control:
    """The present orders, and the number of tries for each recipient."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = 0
        self._tries: dict[tuple[str, str], int] = {}
        self.orders = Orders()

    def refresh(self) -> Orders:
        """Read the file again if it has changed, and return the orders. A wrong file changes nothing."""
        try:
            stamp = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.orders = _orders(json.loads(self._path.read_text())) if stamp else Orders()
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                print(f"{self._path}: {error!r}", flush=True)
        return self.orders

    def fault(self, recipient: str) -> Fault | None:
        """Return the fault of this try for `recipient`, None for no fault. Each call counts as a try."""
        for rule in self.orders.rules:
            if fnmatch.fnmatchcase(recipient.lower(), rule.rcpt) and (
                self.orders.chance.random() < rule.probability
            ):
                return self._if_due(rule.fault, recipient)
        fault = fault_of(recipient)
        return fault and self._if_due(fault, recipient)

    def _if_due(self, fault: Fault, recipient: str) -> Fault | None:
        if not fault.first:
            return fault
        key = (fault.name, recipient.lower())
        self._tries[key] = tries = self._tries.get(key, 0) + 1
        return fault if tries <= fault.first else None
