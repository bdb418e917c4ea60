"""The one list of stages: topics, commands, the local stack, chaos and the tests read it.

docs/add-a-stage.md shows how to add a stage. This module imports no service, and nothing that loads slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.kafka import topics

if TYPE_CHECKING:
    from services.common.config import Settings
    from services.common.events import Event

__all__ = ["DELAYING", "STAGES", "StageSpec", "all_topics", "stage_delays"]


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What the whole project knows of one stage.

    `reads` and `writes` are the bare names of its event topics; each stage also writes its own dead-letter
    topic. `python -m MODULE` runs its service. `delays_setting` is the field of Settings with the delays of
    its delay topics; it is empty for a stage that defers nothing. `awaited` says whether a mail waits for its
    events. Otherwise they only report, and are gathered even at a low rate (pace.py).
    `settings` are the prefixes of the environment variables that only this stage reads. `replicas` is how
    many the local stack starts by default.
    """

    name: str
    reads: tuple[str, ...]
    module: str
    writes: tuple[str, ...] = ()
    delays_setting: str = ""
    awaited: bool = True
    settings: tuple[str, ...] = ()
    replicas: int = 1

    @property
    def decoders(self) -> Mapping[str, Callable[[bytes | None], Event]]:
        """The decoder of each topic that the stage reads. The first access imports protobuf."""
        from services.common.events import DECODERS  # noqa: PLC0415

        return {topic: DECODERS[topic] for topic in self.reads}

    def delays(self, settings: Settings) -> tuple[int, ...]:
        """Return the seconds of the stage's delay topics, rising."""
        return getattr(settings, self.delays_setting) if self.delays_setting else ()


STAGES: Mapping[str, StageSpec] = {
    stage.name: stage
    for stage in (
        StageSpec(
            "validator",
            reads=(topics.TASK_CREATED,),
            module="services.validator",
            writes=(topics.MX_OK, topics.MX_FAILED, topics.MAIL_DEFERRED),
            delays_setting="validator_delays",
            settings=("POSTROAD_DNS_", "POSTROAD_VALIDATOR_"),
        ),
        StageSpec(
            "sender",
            reads=(topics.MX_OK, topics.TASK_CANCELLED),
            module="services.sender",
            writes=(topics.MAIL_SENT, topics.MAIL_DEFERRED, topics.MAIL_FAILED),
            delays_setting="sender_delays",
            awaited=False,
            settings=(
                "EMAIL_",
                "POSTROAD_DOMAIN_",
                "POSTROAD_HANDOVER_SECONDS",
                "POSTROAD_LEASE_SECONDS",
                "POSTROAD_MAX_RESENDS",
                "POSTROAD_ON_UNCERTAIN",
                "POSTROAD_SENDER_",
            ),
        ),
        StageSpec(
            "status",
            reads=topics.EVENT_TOPICS,
            module="services.status",
            settings=("POSTROAD_BODY_RETENTION",),
        ),
    )
}
"""Every stage by its name, in the order of the pipeline."""

DELAYING = tuple(stage.name for stage in STAGES.values() if stage.delays_setting)
"""The names of the stages that have delay topics."""


def stage_delays(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Return the delays of every stage in seconds, rising; empty for a stage that has none."""
    return {name: stage.delays(settings) for name, stage in STAGES.items()}


def all_topics(settings: Settings) -> Sequence[topics.Topic]:
    """Return every topic that an installation with these settings needs."""
    return topics.wanted(settings, stage_delays(settings))
