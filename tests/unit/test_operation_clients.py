"""The Kafka clients of operations while a cluster changes its leaders, on librdkafka's mock cluster."""

from __future__ import annotations

import contextlib
import ctypes
import threading

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.cli.errors import UNAVAILABLE, explain
from services.common.config import Settings
from services.common.operations import clients
from tests.groups import bounds
from tests.librdkafka import library, mock_cluster

# The request's key in Kafka's protocol.
_LIST_OFFSETS = 2
ASKED = {confluent_kafka.TopicPartition("t", 0): OffsetSpec.latest()}


class Cluster:
    """One broker with one topic of one partition, `t`."""

    def __init__(self) -> None:
        self._owner = Consumer({"group.id": "g", "test.mock.num.brokers": 1})
        self._api = library()
        self._api.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        self._cluster = mock_cluster(self._owner)
        assert self._api.rd_kafka_mock_topic_create(self._cluster, b"t", 1, 1) == 0
        bootstrap = self._api.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self.settings = Settings(POSTROAD_KAFKA_BOOTSTRAP=bootstrap)  # type: ignore[call-arg]

    def set_leader(self, broker: int) -> None:
        """Make this broker the partition's leader, or none: -1."""
        change = self._api.rd_kafka_mock_partition_set_leader
        assert change(self._cluster, b"t", ctypes.c_int32(0), ctypes.c_int32(broker)) == 0

    def refuse_offsets(self, times: int) -> None:
        """Answer the next requests for offsets as a broker that is not the partition's leader."""
        errors = (ctypes.c_int(KafkaError.NOT_LEADER_FOR_PARTITION) for _ in range(times))
        self._api.rd_kafka_mock_push_request_errors(
            self._cluster, ctypes.c_int16(_LIST_OFFSETS), ctypes.c_size_t(times), *errors
        )


def test_offsets_are_listed_once_a_partition_has_a_leader_again() -> None:
    cluster = Cluster()
    cluster.set_leader(-1)
    election = threading.Timer(0.3, cluster.set_leader, [1])
    election.start()
    assert [offset for _, offset in clients.list_offsets(cluster.settings, ASKED)] == [0]
    election.join()


def test_a_cluster_without_leaders_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "TIMEOUT", 0.5)
    cluster = Cluster()
    cluster.set_leader(-1)
    with pytest.raises(KafkaException) as caught:
        clients.list_offsets(cluster.settings, ASKED)
    # On a busy machine the last request may also time out.
    failure = explain(caught.value)
    assert failure is not None
    assert failure.code == UNAVAILABLE


def test_the_tests_themselves_wait_for_a_leader() -> None:
    cluster = Cluster()
    cluster.refuse_offsets(5)
    config = {"bootstrap.servers": cluster.settings.kafka_bootstrap, "group.id": "reader"}
    with contextlib.closing(Consumer(config)) as consumer:
        assert bounds(consumer, confluent_kafka.TopicPartition("t", 0)) == (0, 0)
