"""`stack.env`: what clients and services of the stack are told. What the user set wins.

A variable that is set when the stack is brought up stands for something of the user's own (a relay, a
resolver, a broker), which then is not started here. It is remembered until `down`, so that a later `scale` or
`start` from another terminal gives its process the same settings as the others have.
"""

import dataclasses
from collections.abc import Mapping

from deploy.local.state import SERVICES, StackState
from services.common.stages import STAGES

__all__ = [
    "OPERATORS",
    "REPLACED_BY",
    "SERVES_ONE",
    "concerned",
    "foreign_free",
    "given_variables",
    "merged",
    "replaced",
    "service_environment",
    "stack_environment",
]

# Which process is not started when one of these is set.
REPLACED_BY = {
    "kafka": ("POSTROAD_KAFKA_BOOTSTRAP",),
    "mysql": ("POSTROAD_DATABASE_URL",),
    "dns": ("POSTROAD_DNS_SERVERS",),
    "catcher": ("EMAIL_HOST", "EMAIL_PORT"),
    "api": ("POSTROAD_API",),
}
# Each process' own, or this package's: never taken over from outside.
PRIVATE = {"POSTROAD_LISTEN", "POSTROAD_REPLICA"}
# Where the `postroad` command of the user's own finds an installation: not what this stack is made of.
OPERATORS = {"POSTROAD_CONFIG", "POSTROAD_PROFILE", "POSTROAD_ENV_FILE", "POSTROAD_TOKEN", "POSTROAD_TLS"}
PRIVATE_PREFIXES = ("POSTROAD_HTTP_", "POSTROAD_LOCAL_", "POSTROAD_TEST_")
PREFIXES = ("POSTROAD_", "EMAIL_")
# How the settings begin that one service alone reads; any other setting concerns all services.
SERVES_ONE = {
    "api": (
        "POSTROAD_API_TOKENS",
        "POSTROAD_LISTEN",
        "POSTROAD_MAX_BODY",
        "POSTROAD_MAX_PENDING_CREATES",
    ),
    **{name: stage.settings for name, stage in STAGES.items()},
}
# The topics' alone: `postroad topics apply` reads them, no service does.
TOPICS = ("POSTROAD_PARTITIONS", "POSTROAD_REPLICATION")
LOOPBACK = "127.0.0.1"
# On a desk nobody waits four hours for a second attempt.
SENDER_DELAYS = "2,5,30,120"
VALIDATOR_DELAYS = "1,2,4"


def replaced(state: StackState, process: str) -> bool:
    """Whether the user brought this one along (`kafka`, `mysql`, `dns`, `catcher` or `api`)."""
    return any(state.given.get(variable) for variable in REPLACED_BY[process])


def concerned(variable: str) -> tuple[str, ...]:
    """The services that must be started anew when this setting changes."""
    if variable in TOPICS:
        return ()
    for service, starts in SERVES_ONE.items():
        if variable.startswith(starts):
            return (service,)
    return SERVICES


def foreign_free(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without settings: the processes of a stack get them from its state, all the same ones."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(PREFIXES) or name.startswith("POSTROAD_LOCAL_")
    }


def _own(state: StackState) -> dict[str, str]:
    """What the stack would say if nothing were given."""
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
    if replaced(state, "catcher"):
        own |= {"EMAIL_HOST": LOOPBACK, "EMAIL_PORT": "25"}
    else:
        own |= {"EMAIL_HOST": LOOPBACK, "EMAIL_PORT": str(state.port("catcher", "smtp")), "EMAIL_TLS": "none"}
    return own


def given_variables(state: StackState, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that speak for the user: not empty, not private, not this stack's own words.

    The last matters to whoever runs `up` in a shell that has read stack.env.
    """
    own = _own(dataclasses.replace(state, given={}))
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(PREFIXES)
        and name not in PRIVATE | OPERATORS
        and not name.startswith(PRIVATE_PREFIXES)
        and value
        and own.get(name) != value
    }


def merged(state: StackState, environ: Mapping[str, str]) -> dict[str, str]:
    """What was given so far, and what `environ` gives now.

    Where `environ` has the value that is the stack's own, that ends what was given.
    """
    own = _own(dataclasses.replace(state, given={}))
    kept = {name: value for name, value in state.given.items() if environ.get(name) != own.get(name, "")}
    return {**kept, **given_variables(state, environ)}


def stack_environment(state: StackState) -> dict[str, str]:
    """The content of stack.env: the stack's own words, what was given, and where each replica's health is."""
    health = {
        f"POSTROAD_HTTP_{name.upper().replace('-', '_')}": f"{LOOPBACK}:{state.port(name, 'http')}"
        for name in state.service_names()
    }
    return {**_own(state), **state.given, **health}


def service_environment(state: StackState, name: str) -> dict[str, str]:
    """What the replica `name` gets on top of the command's own environment."""
    listen = {"POSTROAD_LISTEN": f"{LOOPBACK}:{state.port(name, 'grpc')}"} if name.startswith("api-") else {}
    return {
        **stack_environment(state),
        **listen,
        "POSTROAD_HTTP_LISTEN": f"{LOOPBACK}:{state.port(name, 'http')}",
        "POSTROAD_REPLICA": name,
    }
