"""The sender of a whole system drains while replies are late, and works while a domain hangs."""

from __future__ import annotations

import pytest

from tests.cli import Command
from tests.e2e.load import Load
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.replicas import busy, metric
from tests.forms import by_form
from tests.stack import Stack


@pytest.mark.timeout(900)
def test_scaling_and_restarts_cut_off_no_mail_that_was_handed_over(hold_stack: Stack) -> None:
    stack = hold_stack
    with Pipeline(stack) as pipeline:
        # Each reply comes later than a revocation or a drain would wait.
        stack.control_mail(rules=[{"rcpt": "*", "fault": by_form("slow-2000", "slow-25000")}])
        with Load(pipeline, "handed-over", rate=by_form(3, 0.3)) as load:
            until(lambda: busy(stack, "sender-1") > 2, "mails are handed over", 120)
            stack.scale("sender", 2)
            until(lambda: busy(stack, "sender-2") > 0, "the second sender works too", 120)
            stack.stop("sender-2")
        stack.control_mail()
        tasks = pipeline.settled(load.ids, by_form(60, 300))
        stack.scale("sender", 1)
        # A mail that was cut off would be in doubt, and its task uncertain.
        assert {task.status for task in tasks.values()} == {"completed"}
        assert set(pipeline.copies(load.ids).values()) == {1}
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)


@pytest.mark.timeout(300)
def test_a_domain_that_hangs_blocks_neither_partitions_nor_the_sender(hold_stack: Stack) -> None:
    stack = hold_stack
    with Pipeline(stack) as pipeline:
        # Twice what the sender holds in memory, in every partition, ahead of all others.
        stuck = pipeline.create_many(["hang@stuck.ok.test" for _ in range(120)], "stuck")
        try:
            until(lambda: busy(stack, "sender-1") == 6, "a domain hangs")
            others = pipeline.create_many([f"o{n}@o{n}.ok.test" for n in range(20)], "others")
            tasks = pipeline.settled(others, 60)
            assert {task.status for task in tasks.values()} == {"completed"}
            assert set(pipeline.copies(others).values()) == {1}
            assert metric(stack, "sender-1", "postroad_sender_crowded_total") > 0
            held = 'postroad_sender_domain_sessions{domain="stuck.ok.test"}'
            assert metric(stack, "sender-1", held) == 6
            postroad = Command({"POSTROAD_ENV_FILE": str(stack.directory / "stack.env")})
            found = postroad("lag", "--stage", "sender", "--domains", "--interval", "0", "-o", "json").json
            assert found["domains"][0]["domain"] == "stuck.ok.test"
            assert found["domains"][0]["sending"] >= 6
            # Some of their events are still being folded. To wait for others is no attempt.
            until(lambda: _progress(pipeline, stuck) == {("processing", 0)}, "what is stuck is processed")
        finally:
            # The mails that hang lose their connections.
            stack.kill("catcher")
            stack.control_mail(rules=[{"rcpt": "*@stuck.ok.test", "fault": "slow-1"}])
            stack.start("catcher")
        tasks = pipeline.settled(stuck)
        stack.control_mail()
        assert {task.status for task in tasks.values()} == {"completed", "uncertain"}


def _progress(pipeline: Pipeline, ids: list[str]) -> set[tuple[str, int]]:
    """Return the statuses of these tasks and their numbers of attempts."""
    wanted = set(ids)
    return {(task.status, task.attempts) for task in pipeline.list_all() if task.id in wanted}
