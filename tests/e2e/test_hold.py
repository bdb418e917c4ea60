"""A system holds mails in doubt: an operator decides whether to send them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.e2e.pipeline import Pipeline, until
from tests.e2e.test_cancel_races import cancel, quiet, reason, retry
from tests.e2e.test_sender import LEASE, metric
from tests.stack import Infra, Stack, further, running


@pytest.fixture(scope="module")
def stack(infra: Infra) -> Iterator[Stack]:
    """One system for the tests of this module."""
    with running(further(infra, POSTROAD_LEASE_SECONDS=LEASE, POSTROAD_ON_UNCERTAIN="hold")) as stack:
        yield stack


@pytest.mark.timeout(300)
def test_a_killed_senders_mails_are_never_sent_again(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        ids = pipeline.create_many([f"slow-1500@h{n}.ok.test" for n in range(60)], "hold")
        until(lambda: metric(stack, "sender-1", "postroad_sender_claims ") > 0, "claims in hand")
        stack.kill("sender-1")
        stack.start("sender-1")
        tasks = pipeline.settled(ids, 60)
        copies = pipeline.copies(ids)
        assert max(copies.values()) == 1
        statuses = {task.status for task in tasks.values()}
        assert statuses == {"completed", "uncertain"}
        for task in tasks.values():
            if task.status == "completed":
                assert copies[task.id] == 1
            else:
                assert (task.reason, pipeline.doubts(task.id)) == ("in_doubt", 1)


@pytest.mark.timeout(300)
def test_retry_sends_failed_and_uncertain_tasks_and_never_sent_ones(
    stack: Stack,
) -> None:
    with Pipeline(stack) as pipeline:
        stack.control_mail(
            rules=[
                {"rcpt": "no*@*", "fault": "reject5"},
                {"rcpt": "lost*@*", "fault": "drop-lost-always"},
            ]
        )
        refused = [pipeline.create(f"no{n}@d{n}.ok.test") for n in range(8)]
        lost = [pipeline.create(f"lost{n}@d{n}.ok.test") for n in range(8)]
        sent = [pipeline.create(f"yes{n}@d{n}.ok.test") for n in range(8)]
        tasks = pipeline.settled([*refused, *lost, *sent])
        for ids, status in ((refused, "failed"), (lost, "uncertain"), (sent, "completed")):
            assert {tasks[id_].status for id_ in ids} == {status}
        # Cancel answers what has really happened. It closes a task whose mail may be out.
        for ids, status in ((refused, "failed"), (lost[:4], "cancelled"), (sent, "completed")):
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
