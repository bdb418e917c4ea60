"""A member and its coordinator come to agree on the partitions it owns, whatever was lost between them."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from services.common.config import Settings
from services.common.kafka.topics import MX_OK
from services.common.stage import membership
from services.common.stage.coordinator_view import CoordinatorView
from tests.groups import describe
from tests.integration.stage_kit import PARTITIONS, Kit, created, passed_on, until


class _LosesAssignments(Consumer):
    """A real Consumer that hides from its poller, while it is `losing`, which partitions it gets.

    librdkafka 2.16.1 does much the same. It resends a heartbeat without a response as it was, not in full as
    KIP-848 demands. The broker names new partitions only in its first response.
    """

    losing = False
    lost = 0

    def subscribe(self, topics: list[str], *, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        def assigned(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            if self.losing:
                self.lost += len(partitions)
                consumer.incremental_assign([])
            else:
                on_assign(consumer, partitions)

        super().subscribe(topics, on_assign=assigned, on_revoke=on_revoke, on_lost=on_lost)


def test_without_a_broker_there_is_no_response() -> None:
    view = CoordinatorView(Settings(kafka_bootstrap="127.0.0.1:9"), "validator")
    view.request("someone")
    deadline = time.monotonic() + 30
    while view._request is not None:
        assert time.monotonic() < deadline
        assert view.response() is None
        time.sleep(0.05)


async def test_the_coordinator_names_the_partitions_of_a_member_and_none_of_strangers(newest: Kit) -> None:
    kit = newest
    async with kit.running(handle=passed_on):
        view, responses = CoordinatorView(kit.settings, "validator"), list[Any]()

        def responded() -> bool:
            responses.append(view.response())
            return view._request is None

        [member] = describe(kit.infra.bootstrap, kit.group).members
        view.request(member.id)
        await until(responded)
        topics = ("task.created", "validator.delay.1", "validator.delay.2")
        assert responses[-1] == {(kit.prefix + topic, n) for topic in topics for n in range(PARTITIONS)}
        view.request("a stranger")
        await until(responded)
        assert responses[-1] is None


@pytest.mark.breaks_servers
async def test_partitions_of_a_lost_assignment_are_read_nevertheless(
    newest: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_COMPARE_INTERVAL", 0.5)
    monkeypatch.setattr(membership, "_MISMATCH_GRACE", 2.0)
    kit = newest
    made: list[_LosesAssignments] = []

    def make(config: dict[str, Any]) -> Consumer:
        # It soon notices that the broker is in trouble.
        made.append(_LosesAssignments(config | {"socket.timeout.ms": 3000}))
        return made[-1]

    async with contextlib.AsyncExitStack() as others:
        await others.enter_async_context(kit.running(handle=passed_on))
        async with kit.running(handle=passed_on, consumer=make) as remaining:
            await kit.publish(created(n) for n in range(100))
            await until(lambda: sum(kit.committed().values()) == 100, 30)
            made[0].losing = True
            await others.aclose()
            await until(lambda: made[0].lost, 30)
            # Heartbeats get no response in time only while a broker is in trouble.
            with kit.infra.frozen("kafka-1"):
                await until(lambda: remaining._poller._membership._trouble_at is not None, 30)
            await kit.publish(created(n) for n in range(100))
            await until(lambda: sum(kit.committed().values()) == 200, 60)
            await until(lambda: not remaining.problems(), 30)
    assert len(made) == 2
    assert len({message.key() for message in kit.read(MX_OK)}) == 200
