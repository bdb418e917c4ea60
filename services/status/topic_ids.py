"""Notes the ids of the event topics when the service starts, for `postroad rebuild`."""

from __future__ import annotations

import asyncio

import structlog
from confluent_kafka import KafkaException
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from services.common import topic_ids
from services.common.config import Settings
from services.common.database.errors import error_text
from services.common.database.transactions import transaction
from services.common.kafka import admin as kafka_admin
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["note_topic_ids"]

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 30.0


async def note_topic_ids(engine: Engine, settings: Settings) -> None:
    """Note the ids as soon as Kafka and the database answer, or until cancelled."""
    while True:
        try:
            await asyncio.to_thread(_note, engine, settings)
        except KafkaException as error:
            log.info("topic ids not noted", error=str(error))
        except DBAPIError as error:
            log.info("topic ids not noted", error=error_text(error))
        else:
            return
        await asyncio.sleep(_RETRY_SECONDS)


def _note(engine: Engine, settings: Settings) -> None:
    names = Names(settings.topic_prefix)
    # The stage itself reports a broker that is away.
    ids = topic_ids.topic_ids(
        kafka_admin.admin_client(settings), [names.topic(topic) for topic in EVENT_TOPICS]
    )
    transaction(engine, lambda connection: topic_ids.note(connection, ids))
