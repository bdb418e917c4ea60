"""A system holds mails in doubt: an operator decides whether to send them again."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.e2e.pipeline import Pipeline
from tests.e2e.test_cancel_races import cancel, quiet, reason, retry
from tests.stack import Stack


@pytest.mark.timeout(300)
def test_retry_sends_failed_and_uncertain_tasks_and_never_sent_ones(hold_stack: Stack) -> None:
    stack = hold_stack
    with Pipeline(stack) as pipeline:
        stack.control_mail(
            rules=[
                {"rcpt": "no*@*", "fault": "reject5"},
                {"rcpt": "lost*@*", "fault": "drop-lost-always"},
            ]
        )
        refused = [pipeline.create(f"no{n}@d{n}.ok.test") for n in range(4)]
        lost = [pipeline.create(f"lost{n}@d{n}.ok.test") for n in range(4)]
        sent = [pipeline.create(f"yes{n}@d{n}.ok.test") for n in range(4)]
        tasks = pipeline.settled([*refused, *lost, *sent])
        for ids, status in ((refused, "failed"), (lost, "uncertain"), (sent, "completed")):
            assert {tasks[id_].status for id_ in ids} == {status}
        # Cancel answers what has really happened. It closes a task whose mail may be out.
        for ids, status in ((refused, "failed"), (lost[:2], "cancelled"), (sent, "completed")):
            assert {cancel(pipeline, id_).status for id_ in ids} == {status}
        assert {_refused(pipeline, id_) for id_ in sent} == {
            (grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_SENT")
        }
        stack.control_mail(rules=[])
        with ThreadPoolExecutor(8) as callers:
            opened = list(callers.map(lambda id_: _opened(pipeline, id_), [*refused, *lost] * 3))
        # Three Retries at once open each task once, or again if it has ended meanwhile.
        assert Counter(id_ for id_, done in opened if done).keys() == {*refused, *lost}
        done = pipeline.settled([*refused, *lost])
        assert {task.status for task in done.values()} == {"completed"}
        quiet(pipeline)
        assert set(pipeline.copies([*refused, *lost, *sent]).values()) == {1}
        assert {_refused(pipeline, id_)[1] for id_ in [*refused, *lost]} == {"ALREADY_SENT"}


def _opened(pipeline: Pipeline, id_: str) -> tuple[str, bool]:
    try:
        retry(pipeline, id_)
    except grpc.RpcError as error:
        if reason(error) not in ("NOT_OVER", "ALREADY_SENT"):
            raise
        return id_, False
    return id_, True


def _refused(pipeline: Pipeline, id_: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        retry(pipeline, id_)
    return caught.value.code(), reason(caught.value)  # type: ignore[attr-defined]
