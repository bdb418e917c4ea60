"""ClusterCheck: a service says that Kafka does not answer, or lacks a topic that the service needs."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from services.common.config import Settings
from services.common.kafka import cluster_check
from services.common.kafka.cluster_check import ClusterCheck
from services.common.kafka.topics import TASK_CREATED
from services.common.stages import all_topics
from tests.api_process import eventually
from tests.integration.stage_kit import Kit, passed_on, until
from tests.stack import Infra


def test_a_missing_topic_is_named_until_it_exists(infra: Infra) -> None:
    name = infra.topic_prefix() + "task.created"
    check = ClusterCheck(Settings(kafka_bootstrap=infra.bootstrap), [name])
    check.start()
    try:
        eventually(check.problems)
        assert check.problems() == [f"Kafka has no topic {name}"]
        admin = AdminClient({"bootstrap.servers": infra.bootstrap})
        for done in admin.create_topics([NewTopic(name, 2, 1)]).values():
            done.result(20)
        eventually(lambda: check.problems() == [])
    finally:
        check.stop()


def test_a_broker_that_is_away_is_named() -> None:
    check = ClusterCheck(Settings(kafka_bootstrap="127.0.0.1:9"), ["task.created"])
    assert check.problems() == []
    check.start()
    try:
        eventually(check.problems)
        [problem] = check.problems()
        assert problem.startswith("Kafka at 127.0.0.1:9 does not answer: ")
    finally:
        check.stop()


async def test_a_stage_without_its_topic_says_so(newest: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_check, "_INTERVAL", 0.2)
    kit, name = newest, newest.names.topic(TASK_CREATED)
    async with kit.running(handle=passed_on) as runtime:
        await asyncio.to_thread(kit.admin.delete_topics([name])[name].result, 20)
        await until(lambda: f"Kafka has no topic {name}" in runtime.problems())
        [new] = [NewTopic(t.name, t.partitions, 1) for t in all_topics(kit.settings) if t.name == name]
        await asyncio.to_thread(kit.admin.create_topics([new])[name].result, 20)
        await until(lambda: not any("has no topic" in problem for problem in runtime.problems()))


def test_a_check_that_fails_once_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_check, "_INTERVAL", 0.01)
    monkeypatch.setattr(cluster_check, "_RETRY_INTERVAL", 0.01)
    check = ClusterCheck(Settings(kafka_bootstrap="127.0.0.1:9"), ["task.created"])
    answers = itertools.chain([["slow"], [], ["slow"], []], itertools.repeat(["away"]))
    seen: list[list[str]] = []

    def ask(admin: object) -> list[str]:
        seen.append(check.problems())
        return next(answers)

    monkeypatch.setattr(check, "_check", ask)
    check.start()
    try:
        eventually(lambda: check.problems() == ["away"])
        assert seen[:6] == [[]] * 6
    finally:
        check.stop()
