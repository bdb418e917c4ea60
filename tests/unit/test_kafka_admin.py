"""How `topics apply` waits until the brokers show what it created."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicCollection

from services.common.kafka import admin


class Brokers:
    """Answers as an AdminClient does. `shown` has the topics' partitions at each question; the last stays."""

    def __init__(self, *shown: dict[str, int]) -> None:
        self._shown = list(shown)
        self.asked: list[Sequence[str]] = []

    def describe_topics(self, topics: TopicCollection, request_timeout: float) -> dict[str, Future[Any]]:
        shown = self._shown.pop(0) if len(self._shown) > 1 else self._shown[0]
        names = list(topics.topic_names)  # type: ignore[attr-defined]
        self.asked.append(names)
        return {name: self._answer(shown.get(name, 0)) for name in names}

    def _answer(self, partitions: int) -> Future[Any]:
        answer: Future[Any] = Future()
        if partitions:
            answer.set_result(SimpleNamespace(partitions=range(partitions)))
        else:
            answer.set_exception(KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))
        return answer


def test_it_asks_again_for_the_topics_that_are_missing_or_too_small() -> None:
    brokers = Brokers({"a": 3, "b": 2}, {"b": 2, "c": 3}, {"b": 3})
    admin._wait_until_shown(brokers, {"a": 3, "b": 3, "c": 3})  # type: ignore[arg-type]
    assert brokers.asked == [["a", "b", "c"], ["b", "c"], ["b"]]


@pytest.mark.parametrize("shown", [{}, {"a": 2}])
def test_topics_that_are_never_shown_are_an_error(
    monkeypatch: pytest.MonkeyPatch, shown: dict[str, int]
) -> None:
    monkeypatch.setattr(admin, "SHOWN_SECONDS", 0.1)
    with pytest.raises(KafkaException, match="do not show") as caught:
        admin._wait_until_shown(Brokers(shown), {"a": 3})  # type: ignore[arg-type]
    assert caught.value.args[0].code() == KafkaError._TIMED_OUT
