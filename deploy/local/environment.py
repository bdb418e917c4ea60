"""`stack.env`: the settings of the stack's clients and services. A variable of the user's wins.

Such a variable may name a server of the user's own (a relay, a resolver, a broker), which the stack then does
not start. The stack remembers it until `down`. So `scale` or `start` from another terminal gives a new
process the same settings as the others have.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from deploy.local import security
from deploy.local.state import SERVICES, StackState
from services.common.secret_files import SUFFIX
from services.common.stages import STAGES

__all__ = [
    "OPERATORS",
    "OWN_SETTINGS",
    "REPLACED_BY",
    "given_variables",
    "is_replaced",
    "merge_given",
    "refuse_private",
    "service_environment",
    "services_reading",
    "stack_environment",
    "without_settings",
]

# The stack does not start the process when one of these variables is set.
REPLACED_BY = {
    "kafka": ("POSTROAD_KAFKA_BOOTSTRAP",),
    "mysql": ("POSTROAD_DATABASE_URL", "POSTROAD_DATABASE_URL_FILE"),
    "dns": ("POSTROAD_DNS_SERVERS",),
    "catcher": ("EMAIL_HOST", "EMAIL_PORT"),
    "api": ("POSTROAD_API",),
}
# Each process gets its own value from the stack, so these are never taken from the environment.
PRIVATE = {"POSTROAD_LISTEN", "POSTROAD_REPLICA"}
# They tell the user's `postroad` command where an installation is; they are no settings of the stack.
OPERATORS = {
    "POSTROAD_CA",
    "POSTROAD_CERT",
    "POSTROAD_CONFIG",
    "POSTROAD_ENV_FILE",
    "POSTROAD_KEY",
    "POSTROAD_PROFILE",
    "POSTROAD_TENANT",
    "POSTROAD_TLS",
    "POSTROAD_TOKEN",
    "POSTROAD_TOKEN_FILE",
    "POSTROAD_TOKEN_IN_CLEAR",
}
PRIVATE_PREFIXES = ("POSTROAD_HTTP_", "POSTROAD_LOCAL_", "POSTROAD_TEST_")
PREFIXES = ("POSTROAD_", "EMAIL_")
# The prefixes of the settings that only one service reads. Any other setting concerns all services.
OWN_SETTINGS = {
    "api": (
        "POSTROAD_ACCEPT_COMPRESSION",
        "POSTROAD_ALLOWED_HEADERS",
        "POSTROAD_API_TOKENS",
        "POSTROAD_INSECURE",
        "POSTROAD_LISTEN",
        "POSTROAD_MAX_BODY",
        "POSTROAD_MAX_PENDING_CREATES",
        "POSTROAD_PARTITIONS",
        "POSTROAD_REFLECTION",
        "POSTROAD_TLS_CERT",
        "POSTROAD_TLS_CLIENT_CA",
        "POSTROAD_TLS_KEY",
        "POSTROAD_TOKENS_FILE",
        "POSTROAD_TOKEN_KEYS",
    ),
    **{name: stage.settings for name, stage in STAGES.items()},
}
# The services have another working directory than the user.
FILES = {
    *(f"POSTROAD_TLS_{name}" for name in ("CERT", "CLIENT_CA", "KEY")),
    *(f"POSTROAD_KAFKA_SSL_{name}" for name in ("CA", "CERT", "KEY")),
}
# These services have no database, and do not get its password.
WITHOUT_DATABASE = ("validator",)
# Only `postroad topics apply` reads it; no service does.
TOPICS = ("POSTROAD_REPLICATION",)
LOOPBACK = "127.0.0.1"
# Whoever tries the stack out does not wait hours for a second attempt.
SENDER_DELAYS = "2,5,30,120"
VALIDATOR_DELAYS = "1,2,4"


def is_replaced(state: StackState, process: str) -> bool:
    """Return whether the user has this server elsewhere (`kafka`, `mysql`, `dns`, `catcher` or `api`)."""
    return any(state.given.get(variable) for variable in REPLACED_BY[process])


def services_reading(variable: str) -> tuple[str, ...]:
    """Return the services that read this setting. They must restart when it changes."""
    if variable in TOPICS:
        return ()
    for service, starts in OWN_SETTINGS.items():
        if variable.startswith(starts):
            return (service,)
    if variable.startswith("POSTROAD_DATABASE_"):
        return tuple(service for service in SERVICES if service not in WITHOUT_DATABASE)
    return SERVICES


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without settings: the processes of a stack get the same ones, from its state."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(PREFIXES) or name.startswith("POSTROAD_LOCAL_")
    }


def _own(state: StackState) -> dict[str, str]:
    """Return the settings of the stack without the user's variables."""
    database = (
        f"mysql+mysqlconnector://postroad:{state.password}@{LOOPBACK}:{state.port('mysql', 'sql')}/postroad"
        "?charset=utf8mb4&collation=utf8mb4_general_ci"
    )
    own = {
        "POSTROAD_API": f"{LOOPBACK}:{state.port('api-1', 'grpc')}",
        "POSTROAD_KAFKA_BOOTSTRAP": ",".join(
            f"{LOOPBACK}:{state.port(name, 'client')}" for name in state.kafka_names()
        ),
        "POSTROAD_DATABASE_URL": database,
        "POSTROAD_DNS_SERVERS": f"{LOOPBACK}:{state.port('dns', 'dns')}",
        "POSTROAD_REPLICATION": str(state.kafka_nodes),
        "POSTROAD_LOG_FORMAT": "json",
        "POSTROAD_SENDER_DELAYS": SENDER_DELAYS,
        "POSTROAD_VALIDATOR_DELAYS": VALIDATOR_DELAYS,
        "EMAIL_USER": "",
        "EMAIL_PASS": "",
    }
    if is_replaced(state, "catcher"):
        own |= {"EMAIL_HOST": LOOPBACK, "EMAIL_PORT": "25"}
    else:
        own |= {"EMAIL_HOST": LOOPBACK, "EMAIL_PORT": str(state.port("catcher", "smtp")), "EMAIL_TLS": "none"}
    if state.secure:
        own |= {"POSTROAD_DATABASE_URL": security.database_url(state, "operator")}
        own |= security.kafka_settings(state, "operator")
        own["POSTROAD_KAFKA_SASL_PASSWORD"] = state.passwords["kafka-operator"]
    return own


def given_variables(state: StackState, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environ` that the user set: not empty, not private, not the stack's own value.

    The last rule is for a shell that has read stack.env. Files get absolute paths.
    """
    own = _own(dataclasses.replace(state, given={}))
    return {
        name: str(Path(value).absolute()) if name in FILES or name.endswith(SUFFIX) else value
        for name, value in environ.items()
        if name.startswith(PREFIXES)
        and name not in PRIVATE | OPERATORS
        and not name.startswith(PRIVATE_PREFIXES)
        and value
        and own.get(name) != value
    }


def refuse_private(environ: Mapping[str, str]) -> None:
    """Raise ValueError for a setting of the user's that the stack chooses itself for each process.

    `stack.env` has addresses `POSTROAD_HTTP_SENDER_1` and so on, and the user's shell may have read it.
    """
    if names := [name for name in ("POSTROAD_HTTP_LISTEN", *sorted(PRIVATE)) if environ.get(name)]:
        raise ValueError(
            f"{names[0]} is set, but the local stack chooses the addresses and names of its processes itself;"
            " POSTROAD_LOCAL_API_PORT chooses the api's port"
        )


def merge_given(state: StackState, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables given so far, with those that `environ` gives now.

    A variable that `environ` sets to the stack's own value is no longer given.
    """
    own = _own(dataclasses.replace(state, given={}))
    kept = {name: value for name, value in state.given.items() if environ.get(name) != own.get(name, "")}
    return {**kept, **given_variables(state, environ)}


def stack_environment(state: StackState) -> dict[str, str]:
    """Return the content of stack.env: the stack's settings, the given ones, each replica's HTTP address."""
    health = {
        f"POSTROAD_HTTP_{name.upper().replace('-', '_')}": f"{LOOPBACK}:{state.port(name, 'http')}"
        for name in state.service_names()
    }
    # A secret that the user gave in a file takes the place of the stack's own.
    own = {name: value for name, value in _own(state).items() if name + SUFFIX not in state.given}
    return {**own, **state.given, **health}


def service_environment(state: StackState, name: str) -> dict[str, str]:
    """Return the variables that the replica `name` gets besides the command's own environment.

    It gets no setting that only others read, so that it holds no secret of theirs.
    """
    service = name.rpartition("-")[0]
    listen = {"POSTROAD_LISTEN": f"{LOOPBACK}:{state.port(name, 'grpc')}"} if name.startswith("api-") else {}
    shared = stack_environment(state)
    if state.secure:
        # What the stack's clients have is an operator's.
        shared = {name: value for name, value in shared.items() if name not in security.OPERATORS_SECRETS}
        shared |= security.kafka_settings(state, service) | security.secret_files(state, service)
    return {
        **{variable: value for variable, value in shared.items() if service in services_reading(variable)},
        **listen,
        "POSTROAD_HTTP_LISTEN": f"{LOOPBACK}:{state.port(name, 'http')}",
        "POSTROAD_REPLICA": name,
    }
