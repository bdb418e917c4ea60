"""The words that a shell completes arguments with. Slow imports wait until the shell asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

__all__ = ["complete_from", "reopenable", "stages", "statuses", "topics"]

Words = Callable[[], Iterable[str]]


def complete_from(words: Words) -> Callable[[str], list[str]]:
    """Return the `autocompletion` that Typer needs for an argument with these values."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def statuses() -> Iterable[str]:
    """Return the statuses of tasks."""
    from services.common.statuses import STATUSES  # noqa: PLC0415

    return STATUSES


def reopenable() -> Iterable[str]:
    """Return the statuses that a replay can reopen."""
    from services.common.operations.replay.replay_decision import REOPENABLE  # noqa: PLC0415

    return REOPENABLE


def stages() -> Iterable[str]:
    """Return the names of the stages."""
    from services.common.stages import STAGES  # noqa: PLC0415

    return STAGES


def topics() -> Iterable[str]:
    """Return the topics that can be replayed.

    Delay topics are missing if Kafka does not answer within 1 s.
    """
    from services.cli.settings import effective_variables, make_settings  # noqa: PLC0415
    from services.common.kafka.admin import admin_client  # noqa: PLC0415
    from services.common.kafka.topics import EVENT_TOPICS  # noqa: PLC0415
    from services.common.operations.replay.records import can_replay  # noqa: PLC0415

    found = list(EVENT_TOPICS)
    # A completing shell shows no errors. The command itself will.
    with contextlib.suppress(Exception):
        settings = make_settings(effective_variables({}, os.environ))
        known = admin_client(settings).list_topics(timeout=1).topics
        bare = (name.removeprefix(settings.topic_prefix) for name in known)
        found += sorted(name for name in bare if name not in EVENT_TOPICS and can_replay(name))
    return found
