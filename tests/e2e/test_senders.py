"""Two senders of a whole system: one freezes, one is killed, and a third one joins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.pipeline import Pipeline, until
from tests.e2e.test_kills import Load
from tests.e2e.test_sender import LEASE, metric
from tests.groups import describe
from tests.stack import Infra, Stack, further, running


@pytest.fixture(scope="module")
def stack(infra: Infra) -> Iterator[Stack]:
    """One system for the tests of this module, with two senders."""
    # So short a lease may also end on a busy machine.
    given = {"POSTROAD_LEASE_SECONDS": LEASE, "POSTROAD_MAX_RESENDS": "20", "POSTROAD_PARTITIONS": "12"}
    with running(further(infra, **given), "--sender", "2") as system:
        yield system


@pytest.mark.timeout(300)
def test_a_sender_frozen_past_its_leases_is_fenced(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        # Slow recipients, so that mails are under way at the freeze.
        emails = [f"{'slow-2000' if n % 2 else f'f{n}'}@f{n}.ok.test" for n in range(60)]
        ids = pipeline.create_many(emails, "freeze")
        until(lambda: metric(stack, "sender-1", "postroad_sender_claims ") > 0, "claims in hand")
        with stack.frozen("sender-1"):
            # The other sender gets its partitions after the session timeout, its claims after their leases.
            tasks = pipeline.settled(ids, 60)
        assert {task.status for task in tasks.values()} == {"completed"}
        assert sum(pipeline.doubts(id_) for id_ in ids) > 0, "the freeze hit nothing"
        until(
            lambda: metric(stack, "sender-1", "postroad_sender_claims ") == 0,
            "the frozen sender releases its claims",
        )
        more = pipeline.create_many([f"g{n}@f{n}.ok.test" for n in range(20)], "thaw")
        pipeline.settled(more, 60)
        pipeline.sent_once(ids + more)
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)
        again = {task.id: task for task in pipeline.list_all()}
        assert all(again[id_].status == "completed" for id_ in ids + more)


@pytest.mark.timeout(600)
def test_senders_come_and_go(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        until(lambda: len(_spread(pipeline)) == 2, "two owners", 30)
        assert sum(_spread(pipeline).values()) == 12, "each partition of mx.ok has one owner"

        with Load(pipeline, "scale") as load:
            stack.scale("sender", 3)
            until(lambda: len(_spread(pipeline)) == 3, "the third has its share", 3)
            until(lambda: sum(_spread(pipeline).values()) == 12, "each partition has one owner", 10)
            stack.kill("sender-2")
            until(
                lambda: len(_spread(pipeline)) == 2 and sum(_spread(pipeline).values()) == 12,
                "the killed one's share is taken over within the session timeout",
                # 10 s from its last heartbeat, and the time that the new owners need to join.
                14,
            )
        tasks = pipeline.settled(load.ids, 60)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once(load.ids)


def _spread(pipeline: Pipeline) -> dict[str, int]:
    """Return how many partitions of mx.ok each member of the senders' group owns."""
    names = pipeline.stack.names
    group = describe(pipeline.stack.env()["POSTROAD_KAFKA_BOOTSTRAP"], names.group("sender"))
    owned: list[int] = []
    spread = {}
    for member in group.members:
        mine = member.owned.get(names.topic("mx.ok"), ())
        owned += mine
        if mine:
            spread[member.id] = len(mine)
    assert len(owned) == len(set(owned)), "a partition has two owners"
    return spread
