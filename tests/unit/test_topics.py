"""topics.wanted: how long each topic keeps its records."""

from __future__ import annotations

import pytest

from services.common.config import Settings
from services.common.kafka.topics import EVENT_TOPICS
from services.common.stages import STAGES, all_topics

DAY_MS = 86_400_000


@pytest.mark.parametrize("max_age", [1, 4 * 86_400, 40 * 86_400])
def test_delay_topics_outlast_the_age_limit_and_thirty_days_of_outage(max_age: int) -> None:
    settings = Settings(sender_max_age=max_age, sender_delays=(60, 30 * 86_400))
    keeps = {topic.name: int(topic.config["retention.ms"]) for topic in all_topics(settings)}
    delays = {name: ms for name, ms in keeps.items() if ".delay." in name}
    assert len(delays) == 6
    for name, ms in delays.items():
        longest_wait = 1100 * int(name.rpartition(".")[2])
        assert ms >= 1000 * max_age + 30 * DAY_MS
        assert ms >= longest_wait + 30 * DAY_MS
    assert {keeps[name] for name in EVENT_TOPICS} == {30 * DAY_MS}
    assert {keeps[f"{stage}.dead"] for stage in STAGES} == {365 * DAY_MS}


def test_only_time_removes_a_record() -> None:
    for topic in all_topics(Settings()):
        assert topic.config["retention.bytes"] == "-1"
        assert topic.config["cleanup.policy"] == "delete"
