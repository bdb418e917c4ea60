"""Creates the topics, then prints as JSON what the project makes of the last stage of its list.

test_add_a_stage.py runs it in a copy of the project that has one stage more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.local.layout import Layout
from deploy.local.services import service_component
from deploy.local.state import DEFAULT_REPLICAS, StackState
from services.common.config import Settings
from services.common.kafka import admin
from services.common.stages import STAGES, all_topics
from tests.chaos.plan import plan
from tests.unit.test_setting_readers import NOT_HANDED_ON, given_to, read_by

__all__ = ["facts"]


def facts() -> dict[str, Any]:
    """Return the created topics, the stage's first replica, chaos' faults, and what compose.yaml lacks."""
    settings = Settings()
    given = {
        "POSTROAD_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "POSTROAD_TOPIC_PREFIX": settings.topic_prefix,
    }
    state = StackState(replicas=dict(DEFAULT_REPLICAS), given=given)
    name = state.service_names()[-1]
    component = service_component(Layout(Path("stack")), state, name)
    state.release_ports()
    stage = list(STAGES)[-1]
    return {
        "created": admin.apply(settings, all_topics(settings)).created,
        "name": name,
        "argv": component.argv,
        "env": dict(component.env),
        "address": component.address,
        "faults": [[fault.kind, fault.target] for fault in plan(1, 1200)],
        "missing": sorted(read_by(stage) - NOT_HANDED_ON - given_to(stage)),
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
