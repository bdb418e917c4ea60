"""The plan of a run: which faults come when. A pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.local.state import SERVICES
from services.common.stages import STAGES

__all__ = ["TARGETS", "Fault", "plan"]

TARGETS = (*SERVICES, "mysql", "kafka", "network", "mail", "dns", "disk", "roll", "scale")

BROKERS = ("kafka-1", "kafka-2", "kafka-3")
LINKS = ("mysql", "smtp", "clients", *BROKERS)
ORDERS = ("refuse", "hang", "421", "busy", "drop-after", "drop-lost", "greylist", "slow-800")
# The least and the greatest number of replicas of a service while it is scaled.
REPLICAS = {"api": (1, 2), **dict.fromkeys(STAGES, (2, 3))}

# Seconds of load before the first fault, and after the last one, so that the recovery shows.
_WARM_UP, _COOL_DOWN = 6.0, 10.0
# Longer than the session timeout: the other replicas must take a replica's partitions over.
_GONE = 14.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one target. It begins `at` seconds after the start and lasts for `seconds`.

    `kind` is the name of a method of Nemesis (kill, freeze, scale, ...). `detail` is the order for the mail
    server or the number of replicas. A fault that is `alone` overlaps with no other fault, so that its
    recovery can be measured.
    """

    at: float
    kind: str
    target: str
    seconds: float
    detail: str = ""
    alone: bool = True

    @property
    def name(self) -> str:
        """The fault in a few words."""
        return " ".join(filter(None, (self.kind, self.target, self.detail)))


Card = tuple[str, str, str]


def _cards(targets: Sequence[str]) -> list[Card]:
    """Return every fault of these targets, once."""
    cards: list[Card] = []
    for service in SERVICES:
        if service in targets:
            for number in ("1", "2") if service != "api" else ("1",):
                cards += [(kind, f"{service}-{number}", "") for kind in ("kill", "freeze", "restart")]
    if "mysql" in targets:
        cards += [(kind, "mysql", "") for kind in ("kill", "freeze", "restart")]
    if "kafka" in targets:
        cards += [(kind, broker, "") for broker in BROKERS for kind in ("kill", "freeze", "restart")]
    if "network" in targets:
        cards += [(mode, link, "") for link in LINKS for mode in ("reset", "blackhole", "slow")]
    if "mail" in targets:
        cards += [("mail", "catcher", order) for order in ORDERS]
        cards += [("kill", "catcher", ""), ("freeze", "catcher", "")]
    if "dns" in targets:
        cards += [("servfail", "dns", ""), ("kill", "dns", ""), ("freeze", "dns", "")]
    if "disk" in targets:
        cards += [("full", "mysql", ""), ("full", "kafka-1", "")]
    if "roll" in targets:
        cards += [("roll", "services", "")]
    return cards


def _dealt(cards: Sequence[Card], rng: random.Random) -> Iterator[Card]:
    """Yield cards without end: each comes once before any comes again, and one of every kind comes first.

    A run of ten minutes is shorter than the deck, but must have every kind.
    """
    while cards:
        deck = list(cards)
        rng.shuffle(deck)
        first = {card[0]: card for card in reversed(deck)}.values()
        yield from sorted(deck, key=lambda card: card not in first)


def _seconds(card: Card, rng: random.Random) -> float:
    kind, target, _ = card
    if kind == "freeze":
        return rng.uniform(5, 20)
    if kind == "kill":
        # A killed broker stays away for a while. A killed replica may restart at once.
        return _GONE if target.startswith("kafka") or rng.random() < 0.6 else rng.uniform(0.5, 5)
    if kind in ("restart", "roll"):
        return 0.0
    if kind in ("blackhole", "full"):
        return rng.uniform(6, 12)
    return rng.uniform(4, 10)


def _takes(card: Card, lasts: float) -> float:
    """Return how many seconds no other fault may follow, so that the recovery can be measured."""
    kind, target, _ = card
    if kind == "roll":
        return 25.0
    if kind == "kill" and target.startswith(tuple(STAGES)):
        return max(lasts, _GONE)
    if target == "mysql":
        # MySQL recovers from its log before it accepts logins.
        return lasts + 6.0
    return lasts or 6.0


def plan(seed: int, seconds: float, targets: Sequence[str] = TARGETS) -> list[Fault]:
    """Return the faults of a run of `seconds`, in their order. Raises ValueError for an unknown target."""
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"unknown targets: {', '.join(sorted(unknown))}")
    rng = random.Random(seed)
    seconds -= _COOL_DOWN
    faults = [*_main(random.Random(rng.random()), seconds, targets)]
    if "scale" in targets:
        faults += _scaling(random.Random(rng.random()), seconds, targets)
    return sorted(faults, key=lambda fault: fault.at)


def _main(rng: random.Random, seconds: float, targets: Sequence[str]) -> Iterator[Fault]:
    """Yield one fault after the other, and at times a second one during the first."""
    at = _WARM_UP
    for card in (dealt := _dealt(_cards(targets), rng)):
        lasts = _seconds(card, rng)
        end = at + _takes(card, lasts)
        second = next(dealt) if rng.random() < 0.25 else None
        if end > seconds:
            return
        alone = second is None or second[1] == card[1] or card[0] == "roll"
        yield Fault(round(at, 1), card[0], card[1], round(lasts, 1), card[2], alone)
        if second is not None and not alone:
            start = at + rng.uniform(0.1, max(0.2, end - at - 1))
            lasts = min(_seconds(second, rng), max(1.0, seconds - start))
            yield Fault(round(start, 1), second[0], second[1], round(lasts, 1), second[2], alone=False)
            end = max(end, start + lasts)
        at = end + rng.uniform(6, 9)


def _scaling(rng: random.Random, seconds: float, targets: Sequence[str]) -> Iterator[Fault]:
    """Yield changes of the number of replicas, all through the run."""
    counts = {service: 2 for service in REPLICAS if service in targets}
    at = rng.uniform(8, 20)
    while counts and at < seconds - 5:
        service = rng.choice(sorted(counts))
        least, most = REPLICAS[service]
        counts[service] = rng.choice([n for n in range(least, most + 1) if n != counts[service]])
        yield Fault(round(at, 1), "scale", service, 0.0, str(counts[service]), alone=False)
        at += rng.uniform(15, 30)
