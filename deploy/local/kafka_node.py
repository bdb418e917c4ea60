"""A Kafka node: broker and KRaft controller in one process. A stack has one node or three."""

import base64
import os
import socket
import uuid

from confluent_kafka import Consumer, KafkaException, TopicPartition

from deploy.local import security
from deploy.local.component import Component
from deploy.local.files import write_whole
from deploy.local.kafka_java import META, java, storage_format
from deploy.local.layout import Layout
from deploy.local.ports import HOST
from deploy.local.state import StackState

__all__ = ["kafka_component"]

OFFSETS_PARTITIONS = 12
MAX_MESSAGE = 4 << 20
SESSION = "POSTROAD_LOCAL_BROKER_SESSION"


def _properties(layout: Layout, state: StackState, name: str) -> dict[str, object]:
    """Return server.properties. With these group settings a killed member is replaced in 10 s, not in 45."""
    node = int(name.rpartition("-")[2])
    replicas = state.kafka_nodes
    in_sync = max(1, replicas - 1)
    voters = (f"{n}@{HOST}:{state.port(f'kafka-{n}', 'controller')}" for n in range(1, replicas + 1))
    client = f"PLAINTEXT://{HOST}:{state.port(name, 'client')}"
    plain: dict[str, object] = {
        "listeners": f"{client},CONTROLLER://{HOST}:{state.port(name, 'controller')}",
        "advertised.listeners": client,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    }
    return (_secure_properties(state, name) if state.secure else plain) | {
        "process.roles": "broker,controller",
        "node.id": node,
        "controller.quorum.voters": ",".join(voters),
        "controller.listener.names": "CONTROLLER",
        "log.dirs": layout.data(name),
        "auto.create.topics.enable": "false",
        "num.partitions": 12,
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        "message.max.bytes": MAX_MESSAGE,
        "replica.fetch.max.bytes": MAX_MESSAGE,
        "offsets.topic.num.partitions": OFFSETS_PARTITIONS,
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "transaction.state.log.num.partitions": OFFSETS_PARTITIONS,
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
        "group.initial.rebalance.delay.ms": 0,
        "group.consumer.min.session.timeout.ms": 6000,
        "group.consumer.session.timeout.ms": 10000,
        "group.consumer.min.heartbeat.interval.ms": 1000,
        # librdkafka drops the answer to a heartbeat after one interval. At 1 s it dropped a slow broker's
        # answer that assigned partitions, and nobody read them until the next rebalance.
        "group.consumer.heartbeat.interval.ms": 2000,
        "group.consumer.assignment.interval.ms": 100,
        "group.min.session.timeout.ms": 6000,
        "num.network.threads": 2,
        "num.io.threads": 4,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
        # The controller refuses a killed node until the node's old session is over. If the node was the
        # active controller too, its partitions get new leaders only this long after the election, which takes
        # 3 s. With the default of 9 s there was no leader after 12. A busy machine may silence its
        # only broker for 3 s, and then no partition has a leader: the tests give theirs a longer session.
        "broker.session.timeout.ms": 1000 * int(os.environ.get(SESSION) or (3 if replicas == 1 else 4)),
        "broker.heartbeat.interval.ms": 1000,
    }


def _secure_properties(state: StackState, name: str) -> dict[str, object]:
    """Return the listeners of a secure node, where nobody may do anything without a rule.

    Clients come by SCRAM. Brokers and the administrator come by certificates.
    """
    clients = f"CLIENT://{HOST}:{state.port(name, 'client')},INTERNAL://{HOST}:{state.port(name, 'internal')}"
    return {
        "listeners": f"{clients},CONTROLLER://{HOST}:{state.port(name, 'controller')}",
        "advertised.listeners": clients,
        "listener.security.protocol.map": "CLIENT:SASL_SSL,INTERNAL:SSL,CONTROLLER:SSL",
        "inter.broker.listener.name": "INTERNAL",
        "listener.name.internal.ssl.client.auth": "required",
        "listener.name.controller.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.client.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": security.certificate(state, security.BROKER),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": security.authority(state),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "false",
        "super.users": (
            f"User:CN={security.BROKER};User:CN={security.ADMINISTRATOR};User:{security.ADMINISTRATOR}"
        ),
    }


def kafka_component(layout: Layout, state: StackState, name: str) -> Component:
    """Return the component of the node `name` (`kafka-1` ...). Its first start formats the data directory."""
    node = int(name.rpartition("-")[2])
    address = f"{HOST}:{state.port(name, 'client')}"
    heap = "512m" if state.kafka_nodes == 1 else "384m"
    configuration = layout.root / "data" / f"{name}.properties"

    def prepare() -> None:
        text = "".join(f"{key}={value}\n" for key, value in _properties(layout, state, name).items())
        write_whole(configuration, text)
        if not (layout.data(name) / META).exists():
            storage_format(layout.data(name), node, _cluster_id(f"{layout.root}#{state.password}"))

    def is_ready() -> bool:
        try:
            # A connection that is refused here is not logged by the client library.
            socket.create_connection((HOST, state.port(name, "client")), timeout=1).close()
            administrator = security.administrator_config(state, name) if state.secure else {}
            consumer = Consumer(
                {"bootstrap.servers": address, "group.id": "postroad.ready", "log_level": 0, **administrator}
            )
            try:
                brokers = consumer.list_topics(timeout=1).brokers
                # This makes Kafka create and load the offsets topic. Otherwise the first member of a group
                # waits five seconds for it.
                consumer.committed([TopicPartition("none", 0)], timeout=2)
            finally:
                consumer.close()
        except (OSError, KafkaException):
            return False
        return node in brokers and len(brokers) > state.kafka_nodes // 2

    return Component(
        name=name,
        argv=(*java(heap), "kafka.Kafka", str(configuration)),
        address=address,
        is_ready=is_ready,
        prepare=prepare,
    )


def _cluster_id(seed: str) -> str:
    """Return the cluster's UUID in Kafka's text form (base64url without padding), the same for all nodes.

    It begins with `A`, since one that begins with `-` would look like an option.
    """
    return "A" + base64.urlsafe_b64encode(uuid.uuid5(uuid.NAMESPACE_URL, seed).bytes).decode()[1:22]
