"""The ids of topics, noted in the database: a topic that is created again has another id. It all blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient
from sqlalchemy import Connection, exists, func, insert, select, text

from services.common.database import tables

__all__ = ["note", "recreated", "topic_ids"]

_TIMEOUT = 5.0
_HALF = (1 << 64) - 1


def topic_ids(admin: AdminClient, topics: Collection[str]) -> dict[str, bytes]:
    """Return the present id of each topic (full name).

    Raises `confluent_kafka.KafkaException`, also if a topic does not exist.
    """
    asked = admin.describe_topics(TopicCollection(list(topics)), request_timeout=_TIMEOUT)
    ids = {name: answer.result().topic_id for name, answer in asked.items()}
    return {name: _bytes(id_) for name, id_ in ids.items()}


def _bytes(id_: Any) -> bytes:
    # A Uuid's halves are signed; its type stubs lack them.
    high, low = id_.get_most_significant_bits() & _HALF, id_.get_least_significant_bits() & _HALF
    return bytes((high << 64 | low).to_bytes(16))


def note(connection: Connection, ids: Mapping[str, bytes]) -> None:
    """Note the ids that are not known yet, as seen now."""
    now = func.utc_timestamp(6)
    rows = [{"topic": topic, "id": id_, "seen_at": now} for topic, id_ in sorted(ids.items())]
    connection.execute(insert(tables.topic_ids).prefix_with("IGNORE").values(rows))


def recreated(connection: Connection, ids: Mapping[str, bytes], days: int) -> dict[str, datetime]:
    """Return the topics that had another id before, each with the time (UTC) when its present id was noted.

    Topics whose present id was noted more than `days` ago are left out.
    """
    present, former = tables.topic_ids.alias("present"), tables.topic_ids.alias("former")
    earlier = exists().where(
        former.c.topic == present.c.topic, former.c.id != present.c.id, former.c.seen_at <= present.c.seen_at
    )
    since = func.timestampadd(text("DAY"), -days, func.utc_timestamp(6))
    query = select(present).where(present.c.topic.in_(ids), present.c.seen_at > since, earlier)
    found = connection.execute(query)
    return {row.topic: row.seen_at for row in found if bytes(row.id) == ids[row.topic]}
