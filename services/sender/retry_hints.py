"""How long a mail server asks to wait, read from the text of a reply. Pure."""

import re
from itertools import islice

from services.sender.replies import Reply

__all__ = ["retry_hint"]

# URLs, addresses and brackets: digits in them are never times.
_NO_WORD = ("://", "www.", "@", "[", "<")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_UNIT = r"(?:hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)"
# A duration is a word of its own: "id=7h-5m" and "10.0.0.5m" hold none.
_DURATION = re.compile(
    rf"(?<![\w.:/+-])(?:(?P<clock>\d{{1,3}}:\d{{2}}(?::\d{{2}})?)"
    rf"|(?P<amount>\d{{1,7}} ?{_UNIT}(?:[ ,]{{1,2}}(?:and )?\d{{1,7}} ?{_UNIT})*))(?![\w:/@+-]|\.\w)",
    re.IGNORECASE,
)
_PART = re.compile(r"(\d+) ?([hms])", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z]+|[^\sa-z]")

_WAITING = re.compile(
    r"(?:re)?try(?:ing)?|again|back|wait(?:ing)?|later|delay(?:ed)?|postponed|gr[ae]ylist(?:ed|ing)?|defer(?:red)?"
)
# Words that may come between a word for waiting and its time.
_BEFORE = re.compile(
    r"about|after|another|approximately|around|at|been|for|in|is|least|message|next|of|period|please|than|the"
    r"|time|until|within|you|your|[,:;=(-]"
)
_AFTER = re.compile(r"and|before|next|please|the|then|to|you|your")
# After these words "00:05:00" is the length of a wait; elsewhere it may be a time of day.
_BEFORE_CLOCK = re.compile(r"in|for|wait|[=:]")
_NEAR = 8
# _NEAR tokens of the above have fewer characters than this.
_WINDOW = 120
# Durations of a reply beyond these are ignored.
_MAX_DURATIONS = 20


def retry_hint(reply: Reply, *, at_most: float = 86_400.0) -> float | None:
    """Return the seconds that a 4yz reply asks to wait, from 1 to ``at_most``; None if it asks for none.

    No standard defines such a hint. It is a duration next to a word for waiting, in the forms that
    greylisting servers print: ``retry in 300 seconds``, ``come back in 00:05:00``, ``Greylisted for 1h
    30m``, ``wait 5 minutes``, ``5 minutes before you try again``.
    """
    if not reply.transient:
        return None
    words = " ".join(reply.lines)[:1000].split()
    text = " ".join("." if any(mark in word for mark in _NO_WORD) else word for word in words)
    for found in islice(_DURATION.finditer(text), _MAX_DURATIONS):
        before = _TOKEN.findall(text[max(0, found.start() - _WINDOW) : found.start()].lower())[-_NEAR:][::-1]
        after = _TOKEN.findall(text[found.end() : found.end() + _WINDOW].lower())[:_NEAR]
        if found["clock"] and (not before or not _BEFORE_CLOCK.fullmatch(before[0])):
            continue
        if _leads_to_waiting(before, _BEFORE) or _leads_to_waiting(after, _AFTER):
            return float(min(max(_length(found), 1), at_most))
    return None


def _leads_to_waiting(tokens: list[str], between: re.Pattern[str]) -> bool:
    """Return whether a word for waiting comes first, or after `between` words only."""
    for token in tokens:
        if _WAITING.fullmatch(token):
            return True
        if not between.fullmatch(token):
            return False
    return False


def _length(found: re.Match[str]) -> int:
    if clock := found["clock"]:
        fields = [int(field) for field in clock.split(":")]
        hours, minutes, seconds = fields if len(fields) == 3 else [0, *fields]
        return hours * 3600 + minutes * 60 + seconds
    return sum(int(n) * _SECONDS[unit.lower()] for n, unit in _PART.findall(found["amount"]))
