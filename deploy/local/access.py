"""Gives the programs of a secure stack their rights in Kafka and in the database. Blocks; may be repeated."""

from collections.abc import Iterable

import mysql.connector
from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialAlteration,
    UserScramCredentialUpsertion,
)

from deploy.local import security
from deploy.local.database_users import user_statements
from deploy.local.launcher import StackError
from deploy.local.ports import HOST
from deploy.local.state import StackState
from services.common.operations.acls import PROGRAMS, Acl, required_acls

__all__ = ["grant_in_database", "grant_in_kafka"]

_SECONDS = 20.0
_ITERATIONS = 4096


def grant_in_database(state: StackState, users: Iterable[str]) -> None:
    """Create these users of the database. Raises StackError."""
    passwords = {user: state.passwords[f"mysql-{user}"] for user in users}
    try:
        with (
            mysql.connector.connect(
                host=HOST,
                port=state.port("mysql", "sql"),
                user="postroad",
                password=state.password,
                ssl_ca=str(security.authority(state)),
                ssl_verify_identity=True,
                autocommit=True,
            ) as connection,
            connection.cursor() as cursor,
        ):
            for statement in user_statements("postroad", passwords):
                cursor.execute(statement)
    except mysql.connector.Error as error:
        raise StackError(f"the database's users could not be made: {error}") from error


def grant_in_kafka(state: StackState, topic_prefix: str) -> None:
    """Create the programs' principals in Kafka with their rules. Raises StackError."""
    admin = AdminClient(security.administrator_config(state))
    users: list[UserScramCredentialAlteration] = [
        UserScramCredentialUpsertion(
            f"postroad-{program}",
            ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, _ITERATIONS),
            state.passwords[f"kafka-{program}"].encode(),
        )
        for program in (*PROGRAMS, "admin")
    ]
    bindings = [binding for acl in required_acls(topic_prefix) for binding in _bindings(acl)]
    try:
        for future in admin.alter_user_scram_credentials(users, request_timeout=_SECONDS).values():
            future.result()
        for future in admin.create_acls(bindings, request_timeout=_SECONDS).values():
            future.result()
    except KafkaException as error:
        raise StackError(f"Kafka's rules could not be made: {error}") from error


def _bindings(acl: Acl) -> list[AclBinding]:
    return [
        AclBinding(
            ResourceType[acl.resource.upper()],
            acl.name,
            ResourcePatternType[acl.pattern.upper()],
            f"User:postroad-{acl.program}",
            "*",
            AclOperation[operation],
            AclPermissionType.ALLOW,
        )
        for operation in acl.operations
    ]
