"""What a filter on labels finds: labels are stored as ASCII JSON, which each server compares its own way."""

from __future__ import annotations

from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.api import queries, uuid7
from services.api.filters import Filter
from services.common.database.transactions import transaction
from services.common.fold import delta
from services.common.taskstore import upsert
from tests.event_strategies import mail_task

TEXTS = [
    "plain",
    "ü",
    "Ü",
    "u\u0308",
    "李",
    "\U0001f4ee",
    'a"b',
    "a\\b",
    "\\u00fc",
    "a/b",
    "%s",
    "'; --",
    "a ",
    "\u2028",
    "1",
    "",
]


def test_a_filter_finds_the_label_and_no_other_whatever_its_characters(engine: Engine) -> None:
    tasks = {}
    for number, text in enumerate(TEXTS):
        task = mail_task(number, full=False)
        task.labels["team"] = text
        # A key has a character at least.
        task.labels[text or "none"] = "blue"
        tasks[text] = task
    events = [pb.TaskCreated(task=task, at_us=task.created_at_us) for task in tasks.values()]
    transaction(engine, lambda connection: upsert(connection, [delta(event) for event in events]))

    def found(key: str, value: str) -> list[str]:
        asked = Filter(labels=((key, value),))
        counted = transaction(engine, lambda c: queries.count(c, "tenant", asked))
        page, _ = transaction(engine, lambda c: queries.page(c, "tenant", asked, None, 100))
        assert sum(counted.values()) == len(page)
        return [task.id for task in page]

    for text, task in tasks.items():
        ids = [uuid7.text(task.id)]
        assert found("team", text) == ids, ascii(text)
        assert found(text or "none", "blue") == ids, ascii(text)
    assert found("team", "none") == []
    assert found("ü", "ü") == []
