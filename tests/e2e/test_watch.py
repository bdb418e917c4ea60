"""Watch on the whole system: across all cuts, a client sees every task's timeline in order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from tests.e2e.pipeline import SETTLED, Pipeline, until
from tests.forms import LONG, by_form
from tests.stack import Stack

# Every way to an end that needs no long wait. The mail server refuses a recipient's first try, so no other
# test of this stack uses these recipients.
RECIPIENTS = [
    "ada@good.test", "greylist+watch@good.test", "drop-before+watch@good.test", "drop-after+watch@good.test",
    "drop-lost+watch@good.test", "reject5@good.test", "ada@nowhere.test", "ada@bücher.test",
]  # fmt: skip
LABELS = {"watched": "yes"}
ROUNDS = by_form(4, 25)

Story = list[task_pb2.TimelineEntry]


@pytest.fixture(scope="module")
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


class Seen:
    """What a client has seen over all its streams, and its resume token."""

    def __init__(self) -> None:
        self.stories: dict[str, Story] = {}
        self.token = ""
        self.streams = 0

    def take(self, message: pb.WatchResponse) -> None:
        self.token = message.resume_token
        if message.HasField("change"):
            story = self.stories.setdefault(message.task.id, [])
            if message.change not in story:
                story.append(message.change)

    def read(self, stub: rpc.TaskServiceStub, most: int, over: threading.Event) -> None:
        """Open a stream and read up to so many messages, until it ends or all tasks have ended."""
        request = pb.WatchRequest(labels=LABELS, resume_token=self.token)
        call = stub.Watch(request, wait_for_ready=True)
        threading.Thread(target=lambda: over.wait() and call.cancel(), daemon=True).start()
        self.streams += 1
        try:
            for number, message in enumerate(call, start=1):
                self.take(message)
                if number >= most:
                    call.cancel()
        except grpc.RpcError as error:
            # The test cut the stream, or the api restarts.
            if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
                raise


def test_streams_cut_at_any_moment_show_every_timeline(pipeline: Pipeline, stack: Stack) -> None:
    chance = random.Random(3)
    seen, over = Seen(), threading.Event()
    seen.read(pipeline.stub, 1, threading.Event())
    assert seen.token

    def watch() -> None:
        while not over.is_set():
            seen.read(pipeline.stub, chance.randint(1, 40), over)
            time.sleep(chance.random() / 20)

    def create(email: str) -> str:
        request = pb.CreateRequest(data=pb.TaskData(email=email, subject="s", body="b", labels=LABELS))
        task: task_pb2.Task = pipeline.stub.Create(request, timeout=20, wait_for_ready=True)
        return task.id

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ids = []
        for number in range(ROUNDS):
            ids += [create(email) for email in RECIPIENTS]
            if LONG and number == ROUNDS // 2:
                stack.stop("api-1")
                stack.start("api-1")
        tasks = pipeline.settled(ids, 120)
        stories = {id_: list(pipeline.get(id_).timeline) for id_ in ids}
        until(lambda: seen.stories == stories, "every timeline is seen")
    finally:
        over.set()
        watcher.join()
    assert {task.status for task in tasks.values()} <= SETTLED
    assert seen.streams > 3, "few streams were cut"
