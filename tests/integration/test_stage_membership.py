"""A member and its coordinator come to agree on who owns what, whatever was lost between them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from services.common.stage import membership
from services.common.topics import MX_OK
from tests.integration.stage_kit import Kit, created, passed_on, until


class _HardOfHearing(Consumer):
    """A real Consumer that, while it is `deaf`, keeps to itself which partitions it is given.

    In effect librdkafka 2.16.1 does so: a heartbeat that is not answered within its interval is sent again as
    it was, not in full as KIP-848 wants it, and the broker tells of new partitions in its first answer alone.
    """

    deaf = False
    missed = 0

    def subscribe(self, topics: list[str], *, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        def assigned(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            if self.deaf:
                self.missed += len(partitions)
                consumer.incremental_assign([])
            else:
                on_assign(consumer, partitions)

        super().subscribe(topics, on_assign=assigned, on_revoke=on_revoke, on_lost=on_lost)


async def test_partitions_of_which_a_member_never_heard_are_read_nevertheless(
    newest: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_COMPARE", 0.5)
    monkeypatch.setattr(membership, "_DIFFER", 2.0)
    kit = newest
    made: list[_HardOfHearing] = []

    def make(config: dict[str, Any]) -> Consumer:
        made.append(_HardOfHearing(config))
        return made[-1]

    async with contextlib.AsyncExitStack() as others:
        await others.enter_async_context(kit.running(handle=passed_on))
        async with kit.running(handle=passed_on, consumer=make) as remaining:
            await kit.publish(created(n) for n in range(100))
            await until(lambda: sum(kit.committed().values()) == 100, 30)
            made[0].deaf = True
            await others.aclose()
            await until(lambda: made[0].missed, 30)
            await kit.publish(created(n) for n in range(100))
            await until(lambda: sum(kit.committed().values()) == 200, 30)
            assert not remaining.problems()
    assert len(made) == 2
    assert len({message.key() for message in kit.read(MX_OK)}) == 200
