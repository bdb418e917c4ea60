"""Where the record of a letter goes that is sent back, and as what. Pure.

A record that died as a first attempt goes to its event topic, as it was there at first. One that died on a
retry goes to a delay topic of its stage, as the attempt that it was and due at once: on the event topic it
would be a first attempt again, and the sender takes that for a record which a later one has overtaken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from services.cli.dead.letter import Letter
from services.common.kafka.headers import delayed_headers, original_headers
from services.common.kafka.records import Headers
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.stages import STAGES

__all__ = ["Back", "back", "replayable"]


class Back(NamedTuple):
    """The topic (bare name) and the headers of a record that goes back; key and value are the letter's."""

    topic: str
    headers: Headers


def replayable(letter: Letter) -> bool:
    """Whether it is known which event topic the letter's record came from."""
    return letter.origin is not None and letter.origin.topic in EVENT_TOPICS


def back(letter: Letter, headers: Headers | None, delays: Mapping[str, tuple[int, ...]]) -> Back:
    """Return where the record of a `replayable` letter goes; `headers` are all of the letter's.

    `delays`: the delays in seconds of each stage that has some.
    """
    origin, stage = letter.origin, letter.place.stage
    assert origin is not None
    first, own = original_headers(headers), delays.get(stage)
    # What a stage does not read itself would be a letter again.
    if letter.attempt > 1 and own and origin.topic in STAGES[stage].reads:
        again = delayed_headers(first, origin=origin, attempt=letter.attempt, cause="replayed", due_at_ms=0)
        return Back(Names().delay(stage, own[0]), again)
    return Back(origin.topic, first)
