"""How a command fails: one line on stderr and an exit code.

A command raises `Failure(line, code)`. It need not catch the errors of its libraries: `explain` turns them
into a Failure. They come from gRPC, Kafka, MySQL, Typer, the settings and the operations.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from typer.exceptions import Abort, TyperException

__all__ = [
    "DENIED",
    "FAILED",
    "INTERRUPTED",
    "NOT_FOUND",
    "OK",
    "UNAVAILABLE",
    "USAGE",
    "Failure",
    "explain",
    "grpc_exit",
    "is_kafka_error",
]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
DENIED: Final = 4
UNAVAILABLE: Final = 5
INTERRUPTED: Final = 130

_GRPC: Final = {
    "INVALID_ARGUMENT": USAGE,
    "NOT_FOUND": NOT_FOUND,
    "UNAUTHENTICATED": DENIED,
    "PERMISSION_DENIED": DENIED,
    "UNAVAILABLE": UNAVAILABLE,
    "DEADLINE_EXCEEDED": UNAVAILABLE,
    "RESOURCE_EXHAUSTED": UNAVAILABLE,
}
_KAFKA: Final = {
    "_ALL_BROKERS_DOWN": UNAVAILABLE,
    "_RESOLVE": UNAVAILABLE,
    "_TIMED_OUT": UNAVAILABLE,
    "_TRANSPORT": UNAVAILABLE,
    "_WAIT_COORD": UNAVAILABLE,
    # The retriable codes of Kafka's protocol guide ("Error Codes") that a command can meet.
    "COORDINATOR_LOAD_IN_PROGRESS": UNAVAILABLE,
    "COORDINATOR_NOT_AVAILABLE": UNAVAILABLE,
    "FENCED_LEADER_EPOCH": UNAVAILABLE,
    "KAFKA_STORAGE_ERROR": UNAVAILABLE,
    "LEADER_NOT_AVAILABLE": UNAVAILABLE,
    "LISTENER_NOT_FOUND": UNAVAILABLE,
    "NETWORK_EXCEPTION": UNAVAILABLE,
    "NOT_CONTROLLER": UNAVAILABLE,
    "NOT_COORDINATOR": UNAVAILABLE,
    "NOT_ENOUGH_REPLICAS": UNAVAILABLE,
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": UNAVAILABLE,
    "NOT_LEADER_FOR_PARTITION": UNAVAILABLE,
    "OFFSET_NOT_AVAILABLE": UNAVAILABLE,
    "REQUEST_TIMED_OUT": UNAVAILABLE,
    "UNKNOWN_LEADER_EPOCH": UNAVAILABLE,
    "UNSTABLE_OFFSET_COMMIT": UNAVAILABLE,
    "_AUTHENTICATION": DENIED,
    "_SSL": DENIED,
    "CLUSTER_AUTHORIZATION_FAILED": DENIED,
    "GROUP_AUTHORIZATION_FAILED": DENIED,
    "SASL_AUTHENTICATION_FAILED": DENIED,
    "TOPIC_AUTHORIZATION_FAILED": DENIED,
    "UNKNOWN_TOPIC_OR_PART": NOT_FOUND,
    "_UNKNOWN_PARTITION": NOT_FOUND,
    "_UNKNOWN_TOPIC": NOT_FOUND,
}
# MySQL's codes for denied access: to a database, a user, a table, a column, without a privilege of the whole
# server, without a password, to a locked account.
_MYSQL_DENIED: Final = frozenset({1044, 1045, 1142, 1143, 1227, 1698, 3118})


_TOKEN_LINES: Final = {
    "TOKEN_MISSING": "the api needs a token: set POSTROAD_TOKEN or POSTROAD_TOKEN_FILE",
    "TOKEN_UNKNOWN": "the api does not know this token (POSTROAD_TOKEN, POSTROAD_TOKEN_FILE or --token)",
}
_OPERATIONS: Final = "services.common.operations.errors"


class Failure(Exception):
    """A command fails: a line for people, without a full stop, and an exit code."""

    def __init__(self, line: object, code: int = FAILED) -> None:
        super().__init__(" ".join(str(line).split()))
        self.line = str(self)
        self.code = code


def explain(error: BaseException, brokers: str = "") -> Failure | None:
    """Return what a library's error means to the user, None where it is a fault of this program.

    `brokers` are Kafka's addresses, empty where they are not known.
    """
    if isinstance(error, Failure):
        return error
    if isinstance(error, KeyboardInterrupt | Abort):
        return Failure("interrupted", INTERRUPTED)
    if isinstance(error, TyperException):
        return _usage(error)
    # Only an imported library can have raised it. Importing all of them would take longer than most commands.
    if _is(error, "grpc", "RpcError"):
        return _grpc(error)
    if is_kafka_error(error):
        return _kafka(error, brokers)
    if _is(error, "pydantic", "ValidationError"):
        return _settings(error)
    if _is(error, _OPERATIONS, "OperationError"):
        return _operation(error)
    if _is(error, "sqlalchemy.exc", "ArgumentError"):
        return Failure(f"POSTROAD_DATABASE_URL (--database): {error}", USAGE)
    if _is(error, "sqlalchemy.exc", "DBAPIError") or _is(error, "sqlalchemy.exc", "TimeoutError"):
        return _database(error)
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= c <= "\udfff" for c in error.object):
        # Python turns a byte that is not UTF-8 into half of a surrogate pair.
        return Failure(f"{error.object!a} is not in UTF-8", USAGE)
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return Failure(f"{named}{error.strerror or error}", UNAVAILABLE if _is_network(error) else FAILED)
    return None


def grpc_exit(code: str) -> int:
    """Return the exit code for the name of a gRPC status code."""
    return OK if code == "OK" else _GRPC.get(code, FAILED)


def is_kafka_error(error: BaseException) -> bool:
    """Return whether it is an error of Kafka's client."""
    return _is(error, "confluent_kafka", "KafkaException")


def _is(error: BaseException, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _is_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ == "gaierror"


def _usage(error: TyperException) -> Failure:
    if not error.format_message().strip():
        return Failure("", USAGE)  # without a command, Typer has shown the help
    message = error.format_message().rstrip(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    hint = f" (try '{context.command_path} --help')" if context is not None else ""
    return Failure(message[:1].lower() + message[1:] + hint, USAGE)


def _grpc(error: Any) -> Failure:
    code = error.code().name
    line = error.details() or code
    # The api adds google.rpc details to its own errors. An error without them is gRPC's: the api was not
    # reached.
    own = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if code == "UNAVAILABLE" and not own:
        line = f"the api does not answer: {line.rpartition('last error: ')[2]}"
    if code == "DEADLINE_EXCEEDED":
        line = "the api did not answer in time"
    if code == "UNIMPLEMENTED":
        line = f"the api does not know this call, it may be an older version: {line}"
    if own and code == "UNAUTHENTICATED":
        # The api's text names the metadata, which the user of a command does not set.
        line = _TOKEN_LINES.get(_reason(error), line)
    # The answer concerns one task. The api works, and can be asked about the next one.
    about_task = code == "UNAVAILABLE" and own and _reason(error) == "BEING_SENT"
    return Failure(line, FAILED if about_task else grpc_exit(code))


def _reason(error: Any) -> str:
    """Return the reason of the error's google.rpc.ErrorInfo, empty where it has none that can be read."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415
    from google.rpc import error_details_pb2  # noqa: PLC0415
    from grpc_status import rpc_status  # noqa: PLC0415

    info = error_details_pb2.ErrorInfo()
    try:
        status = rpc_status.from_call(error)
        found = status is not None and any(detail.Unpack(info) for detail in status.details)
    except (DecodeError, ValueError):
        # A proxy may write details of another kind, or a status that contradicts them.
        return ""
    return info.reason if found else ""


def _kafka(error: Any, brokers: str) -> Failure:
    cause = error.args[0]
    kafka = f"Kafka at {brokers}" if brokers else "Kafka"
    name = cause.name() if hasattr(cause, "name") else ""
    if _KAFKA.get(name) == UNAVAILABLE:
        return Failure(f"{kafka} does not answer: {cause.str()}", UNAVAILABLE)
    return Failure(f"{kafka}: {cause.str() if name else cause}", _KAFKA.get(name, FAILED))


def _operation(error: Any) -> Failure:
    if _is(error, _OPERATIONS, "InvalidOption"):
        flag = error.option.upper() if error.option == "topic" else f"--{error.option}"
        return Failure(f"{flag}: {error.problem}", USAGE)
    if _is(error, _OPERATIONS, "InvalidDatabaseUrl"):
        return Failure(f"POSTROAD_DATABASE_URL (--database): {error}", USAGE)
    return Failure(error, NOT_FOUND if _is(error, _OPERATIONS, "NotFound") else FAILED)


def _settings(error: Any) -> Failure:
    from services.common.config import refusals  # noqa: PLC0415

    return Failure("; ".join(refusals(error)), USAGE)


def _database(error: Any) -> Failure:
    from services.common.database.errors import error_text, is_transient  # noqa: PLC0415

    number = getattr(getattr(error, "orig", None), "errno", None)
    code = DENIED if number in _MYSQL_DENIED else UNAVAILABLE if is_transient(error) else FAILED
    return Failure(f"the database: {error_text(error)}", code)
