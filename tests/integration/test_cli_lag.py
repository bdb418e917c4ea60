"""`postroad lag` on a real cluster, where no stage runs."""

from __future__ import annotations

import time

from confluent_kafka import Producer

from tests.cli import Command
from tests.stack import Infra


def installation(infra: Infra, **settings: str) -> tuple[Command, str]:
    """An installation of the test's own: its command, and the prefix of its topics."""
    prefix = infra.topic_prefix()
    postroad = Command(
        {
            "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
            "POSTROAD_TOPIC_PREFIX": prefix,
            "POSTROAD_PARTITIONS": "2",
            "POSTROAD_VALIDATOR_DELAYS": "7",
            "POSTROAD_SENDER_DELAYS": "9",
            **settings,
        }
    )
    return postroad, prefix


def put(infra: Infra, topic: str, *headers: tuple[str, bytes]) -> None:
    producer = Producer({"bootstrap.servers": infra.bootstrap, "acks": "all"})
    producer.produce(topic, value=b"x" * 100_000, headers=list(headers), partition=0)
    assert producer.flush(20) == 0


def test_without_topics_it_says_what_to_do(infra: Infra) -> None:
    postroad, prefix = installation(infra)
    done = postroad("lag")
    assert (done.code, done.out) == (3, "")
    assert done.err == f"postroad: no topic {prefix}task.created: 'postroad topics apply' creates it\n"


def test_what_nobody_ever_read_waits_from_the_start(infra: Infra) -> None:
    """Two stages read one topic, and each has its own head there."""
    postroad, prefix = installation(infra)
    assert postroad("topics", "apply").code == 0
    put(infra, f"{prefix}task.created")
    time.sleep(0.3)  # the record has an age
    put(infra, f"{prefix}task.created")
    found = postroad("lag", "--partitions", "--interval", "0", "-o", "json").json
    stages = {row["stage"]: row for row in found["stages"]}
    assert {name: row["lag"] for name, row in stages.items()} == {"validator": 2, "sender": 0, "status": 2}
    assert {name: row["state"] for name, row in stages.items()} == dict.fromkeys(stages, "none")
    for name in ("validator", "status"):
        assert 0.3 <= stages[name]["oldest_waiting_seconds"] < 60
        assert stages[name]["unowned"] == stages[name]["partitions"]
    assert stages["sender"]["oldest_waiting_seconds"] is None


def test_a_delay_that_was_taken_out_is_shown_as_long_as_something_waits(infra: Infra) -> None:
    postroad, prefix = installation(infra)
    assert postroad("topics", "apply").code == 0
    others = {"POSTROAD_VALIDATOR_DELAYS": "8"}
    assert postroad("topics", "apply", **others).code == 0

    def delays() -> list[tuple[str, int, bool]]:
        asked = ("lag", "--stage", "validator", "--interval", "0", "-o", "json")
        return [
            (row["topic"], row["waiting"], row["read"]) for row in postroad(*asked, **others).json["delays"]
        ]

    assert delays() == [("validator.delay.8", 0, False)]
    put(infra, f"{prefix}validator.delay.7", ("due-at", b"1000"))
    assert delays() == [("validator.delay.7", 1, False), ("validator.delay.8", 0, False)]
