"""Services die under load: every task still ends, and no mail goes out twice unrecorded."""

from __future__ import annotations

import pytest

from deploy.local.state import SERVICES
from tests.e2e.load import Load
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.replicas import metric
from tests.forms import by_form
from tests.stack import Stack

# The short form kills all at once: a killed member's partitions wait for its session to end.
KILLS = by_form([SERVICES], [(service,) for service in SERVICES])
TASKS = by_form(0, 2000)
IN_FLIGHT = 'postroad_stage_in_flight_records{stage="validator"}'


@pytest.mark.timeout(600)
def test_killed_services_lose_and_repeat_nothing(stack: Stack) -> None:
    with Pipeline(stack) as pipeline, Load(pipeline, "kill") as load:

        def under_way() -> None:
            at = len(stack.journal())
            until(lambda: len(stack.journal()) > at + 8, "mail under way")

        for killed in KILLS:
            # During its work, not before or after.
            under_way()
            with stack.frozen("dns"):
                # Whoever commits a record that it has not finished loses one of these.
                load.ids += pipeline.create_many([f"k@{killed[0]}{n}.ok.test" for n in range(8)], killed[0])
                until(lambda: metric(stack, "validator-1", IN_FLIGHT) >= 8, "unfinished records")
                for service in reversed(killed):
                    stack.kill(f"{service}-1")
            stack.start(*(f"{service}-1" for service in killed))
        under_way()
        until(lambda: len(load.ids) >= TASKS, "as many tasks as asked for", 240)
        load.end()
        tasks = pipeline.settled(load.ids, 120)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once(load.ids)
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)
