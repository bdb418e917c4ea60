"""What the shell completes arguments with. What takes long to import is imported when it asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

__all__ = ["among", "reopenable", "stages", "statuses", "topics"]

Words = Callable[[], Iterable[str]]


def among(words: Words) -> Callable[[str], list[str]]:
    """Return Typer's `autocompletion` for an argument that is one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return complete


def statuses() -> Iterable[str]:
    """Return the statuses of tasks."""
    from services.common.database.tables import STATUSES  # noqa: PLC0415

    return STATUSES


def reopenable() -> Iterable[str]:
    """Return what a replay may reopen."""
    from services.common.operations.replay.decide import REOPENABLE  # noqa: PLC0415

    return REOPENABLE


def stages() -> Iterable[str]:
    """Return the stages of the road."""
    from services.common.stages import STAGES  # noqa: PLC0415

    return STAGES


def topics() -> Iterable[str]:
    """Return the topics that can be replayed, without delay topics where Kafka does not answer at once."""
    from services.cli.settings import settings_of, values  # noqa: PLC0415
    from services.common.kafka.topics import EVENT_TOPICS  # noqa: PLC0415
    from services.common.operations.clients import admin_client  # noqa: PLC0415
    from services.common.operations.replay.records import can_replay  # noqa: PLC0415

    found = list(EVENT_TOPICS)
    # A shell that completes shows no errors; the command itself will.
    with contextlib.suppress(Exception):
        settings = settings_of(values({}, os.environ))
        known = admin_client(settings).list_topics(timeout=1).topics
        bare = (name.removeprefix(settings.topic_prefix) for name in known)
        found += sorted(name for name in bare if name not in EVENT_TOPICS and can_replay(name))
    return found
