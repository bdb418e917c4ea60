"""Senders of a whole system join, freeze and die: no mail goes out twice."""

from __future__ import annotations

import pytest

from tests.e2e.load import Load
from tests.e2e.pipeline import Pipeline, end_sessions, members, until
from tests.e2e.replicas import busy, metric
from tests.stack import Stack


@pytest.mark.timeout(600)
def test_senders_come_and_go(hold_stack: Stack) -> None:
    stack = hold_stack
    senders = [f"sender-{number}" for number in (1, 2, 3)]
    with Pipeline(stack) as pipeline:
        # Mails are under way at every moment.
        stack.control_mail(rules=[{"rcpt": "*", "fault": "slow-2000"}])
        with Load(pipeline, "scale", rate=4) as load:
            stack.scale("sender", 3)
            until(lambda: all(busy(stack, name) > 1 for name in senders), "each one works")
            until(lambda: _spread(stack) == [1, 1, 1], "each sender owns a partition")
            with stack.frozen("sender-1"):
                stack.kill("sender-2")
                load.end()
                stack.control_mail()
                end_sessions(stack, "sender-1", "sender-2")
                # The third one takes the claims over when their leases end.
                tasks = pipeline.settled(load.ids)
                until(lambda: _spread(stack) == [3], "the third one owns all partitions")
        until(lambda: metric(stack, "sender-1", "postroad_sender_claims ") == 0, "the claims are released")
        stack.scale("sender", 1)
        until(lambda: not any(pipeline.lag().values()), "all committed")
        # The frozen one may learn later that the relay took its mail.
        now = {row.id: row.status for row in pipeline.list_all()}
        assert all(now[id_] in (task.status, "completed") for id_, task in tasks.items())
        copies = pipeline.copies(load.ids)
        uncertain = [task for task in tasks.values() if task.status == "uncertain"]
        assert {task.status for task in tasks.values()} == {"completed", "uncertain"}
        assert {copies[id_] for id_, task in tasks.items() if task.status == "completed"} == {1}
        assert max(copies.values()) == 1, "a mail in doubt was sent again"
        assert {(task.reason, pipeline.doubts(task.id)) for task in uncertain} == {("in_doubt", 1)}


def _spread(stack: Stack) -> list[int]:
    """Return how many partitions of mx.ok each sender owns, if it owns any."""
    owned = [member.owned.get(stack.names.topic("mx.ok"), ()) for member in members(stack, "sender")]
    together = [partition for mine in owned for partition in mine]
    assert len(together) == len(set(together)), "a partition has two owners"
    return [len(mine) for mine in owned if mine]
