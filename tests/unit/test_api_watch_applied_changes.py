"""How Watch applies changes, for the live reader and catch-ups."""

from __future__ import annotations

from collections.abc import Sequence

from services.api.watch.applied_changes import AppliedChange, ChangeApplier, watch_messages
from services.api.watch.changes import Change
from services.api.watch.lookup import KnownTasks
from services.api.watch.reorder_buffer import ReorderBuffer
from services.common.fold import delta
from services.common.kafka.topic_partition import RecordLocation
from tests.watch_changes import RETRIED, life, mail, read


def applied(number: int) -> AppliedChange:
    change = read(life(mail(number))[0], offset=number)
    return AppliedChange(change, change.row)


def test_a_receivers_last_message_of_a_group_is_marked() -> None:
    changes = [applied(number) for number in range(3)]
    receivers = {0: ["ann", "bob"], 1: [], 2: ["ann"]}
    found = list(watch_messages(changes, lambda one: receivers[one.change.offset], "before"))
    assert [(receiver, is_last) for receiver, _, is_last in found] == [
        ("ann", False),
        ("ann", True),
        ("bob", True),
    ]
    assert {message.positions_text for _, message, _ in found} == {"before"}
    (_, anns, _), _, (_, bobs, _) = found
    assert anns is bobs, "watchers share a message"


async def test_only_the_database_knows_a_task_that_began_before() -> None:
    sent = read(life(mail())[-1])
    asked: list[Change] = []

    async def look_up(changes: Sequence[Change]) -> KnownTasks:
        asked.extend(changes)
        mail_columns = delta(life(mail())[0])[1:9]
        return KnownTasks({mail().id: (mail_columns[0], None, None, *mail_columns[3:])}, set())  # type: ignore[dict-item]

    applier = ChangeApplier(ReorderBuffer(RETRIED), look_up)
    assert await applier.release([sent], 0.0) == []
    [(change, row)] = await applier.release([], 1.0)
    assert (asked, change, row.recipient) == ([sent], sent, "a0@x.test")


async def test_duplicates_and_skipped_changes_are_not_released() -> None:
    first, second, third = (read(life(mail(number))[0], offset=number, replayed=True) for number in range(3))

    async def look_up(changes: Sequence[Change]) -> KnownTasks:
        return KnownTasks({}, {(first.row.id, first.entry.event_id)})

    applier = ChangeApplier(ReorderBuffer(0), look_up)
    skip = {RecordLocation(*second.partition, second.offset)}
    assert [one.change for one in await applier.release([first, second, third], 0.0, skip)] == [third]
