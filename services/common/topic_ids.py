"""The ids of topics, noted in the database: Kafka gives a topic that is created again another one.

All functions block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from itertools import chain
from typing import Any

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient
from sqlalchemy import Connection

from services.common.database.bulk import placeholders

__all__ = ["note", "recreated", "topic_ids"]

_TIMEOUT = 5.0
_HALF = (1 << 64) - 1


def topic_ids(admin: AdminClient, topics: Collection[str]) -> dict[str, bytes]:
    """Return the id that each topic (full name) has now.

    Raises `confluent_kafka.KafkaException`, also where a topic is not there.
    """
    asked = admin.describe_topics(TopicCollection(list(topics)), request_timeout=_TIMEOUT)
    ids = {name: answer.result().topic_id for name, answer in asked.items()}
    return {name: _bytes(id_) for name, id_ in ids.items()}


def _bytes(id_: Any) -> bytes:
    # A Uuid's halves are signed; its stubs leave them out.
    high, low = id_.get_most_significant_bits() & _HALF, id_.get_least_significant_bits() & _HALF
    return bytes((high << 64 | low).to_bytes(16))


def note(connection: Connection, ids: Mapping[str, bytes]) -> None:
    """Note the ids that are not known yet, as seen now."""
    rows = ", ".join(["(%s, %s, UTC_TIMESTAMP(6))"] * len(ids))
    connection.exec_driver_sql(
        f"INSERT IGNORE INTO topic_ids (topic, id, seen_at) VALUES {rows}", tuple(chain(*sorted(ids.items())))
    )


def recreated(connection: Connection, ids: Mapping[str, bytes], days: int) -> dict[str, datetime]:
    """Return the topics that had another id before, each with the time (UTC) when its present one was noted.

    Topics whose present id was noted more than `days` ago are left out.
    """
    found = connection.exec_driver_sql(
        "SELECT topic, id, seen_at FROM topic_ids AS present"
        f" WHERE topic IN ({placeholders(len(ids))}) AND seen_at > UTC_TIMESTAMP(6) - INTERVAL {days:d} DAY"
        " AND EXISTS (SELECT 1 FROM topic_ids AS former WHERE former.topic = present.topic"
        " AND former.id <> present.id AND former.seen_at <= present.seen_at)",
        tuple(ids),
    )
    return {topic: seen_at for topic, id_, seen_at in found if bytes(id_) == ids[topic]}
