'''What every command needs: its shared options, its connections, its output.

A command is a function whose first parameter is a `CommandContext`. The others are Typer's, as usual:

    def register(app: typer.Typer) -> None:
        @command(app, "lag", uses=(KAFKA,), examples="""
            postroad lag
            postroad lag --partitions -o json
        """)
        def lag(context: CommandContext, watch: Annotated[bool, typer.Option("--watch")] = False) -> None:
            """Show how far each stage is behind."""
            settings = context.settings()               # services.common.config.Settings
            context.out.rows(rows, COLUMNS)             # or .one(row), .row_writer(COLUMNS)(row)

- `uses` names the connections whose flags the command takes: API, KAFKA, DATABASE. Every command takes `-o`,
  `--profile`, `--config` and `--env-file`. All of these may stand before or after the command's name. A line
  of `examples`, or of a table in a terminal of 80 columns, has at most 76 characters.
- A command raises `Failure(line, code)` of services/cli/errors.py, or lets pass what its libraries raise.
  `main` turns either into one line and the right exit code, also for an unreachable server and for Ctrl-C. To
  put something in order first, catch KeyboardInterrupt and raise Failure(..., INTERRUPTED).
- It prints to stderr with `say`, asks with `confirm(question, yes)` (declare `yes: Yes = False`) and shows
  `progress`, all of services/cli/terminal.py. Whatever else it does is in services/common/operations, which
  neither prints nor asks.
- It imports inside the function what takes long to import: grpc, confluent_kafka, sqlalchemy, and the modules
  of services.common that need them. `postroad --help` loads every command's module.
- services/cli/main.py calls its module's `register`, and makes the `typer.Typer` of a group.
'''

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeAlias

import typer

from services.cli.errors import explain, is_kafka_error
from services.cli.output import Output, OutputFormat
from services.cli.settings import effective_variables, make_settings, with_token

if TYPE_CHECKING:
    import grpc

    from services.common.config import Settings

__all__ = ["API", "DATABASE", "KAFKA", "CommandContext", "Yes", "command", "root"]

P = ParamSpec("P")

API, KAFKA, DATABASE = "api", "kafka", "database"
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True, slots=True)
class _SharedOption:
    """An option that commands share. `type` is its values' type. `in_help`: each command's help has it."""

    text: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    type: Any = str
    in_help: bool = True

    def annotation(self, name: str, *, everywhere: bool) -> Any:
        option = typer.Option(
            *(self.flags or (f"--{name}",)),
            # In Rich's markup, square brackets need a backslash.
            help=self.text.replace("[", r"\["),
            metavar=self.metavar,
            hidden=not (self.in_help or everywhere),
            rich_help_panel="Output and connections",
            show_default=False,
        )
        return Annotated[self.type | None, option]


_COMMON: Mapping[str, _SharedOption] = {
    "output": _SharedOption(
        "The form of the result: table, json or jsonl.", "FORM", ("--output", "-o"), OutputFormat
    ),
    "profile": _SharedOption("A profile of the config file [POSTROAD_PROFILE].", "NAME"),
    "config": _SharedOption(
        "The config file [POSTROAD_CONFIG], otherwise ~/.config/postroad/config.toml.", "FILE", in_help=False
    ),
    "env-file": _SharedOption(
        "A file of NAME=value lines; the environment wins [POSTROAD_ENV_FILE].", "FILE", in_help=False
    ),
}
_USED: Mapping[str, Mapping[str, _SharedOption]] = {
    API: {
        "api": _SharedOption("The api, host:port [POSTROAD_API].", "ADDRESS"),
        "token": _SharedOption("The bearer token. Better: POSTROAD_TOKEN, since ps shows flags.", "TOKEN"),
        "tls": _SharedOption("Whether the api has TLS [POSTROAD_TLS].", None, ("--tls/--no-tls",), bool),
        "ca": _SharedOption("The authority of the api's certificate, in PEM [POSTROAD_CA].", "FILE"),
        "cert": _SharedOption("Your own certificate, in PEM [POSTROAD_CERT].", "FILE", in_help=False),
        "key": _SharedOption("The key of --cert, in PEM [POSTROAD_KEY].", "FILE", in_help=False),
        "token-in-clear": _SharedOption(
            "Send a token without TLS, off this host too [POSTROAD_TOKEN_IN_CLEAR].",
            None,
            ("--token-in-clear/--no-token-in-clear",),
            bool,
            in_help=False,
        ),
        "tenant": _SharedOption("Whose tasks, for operators [POSTROAD_TENANT].", "NAME", in_help=False),
    },
    KAFKA: {
        "kafka": _SharedOption("Kafka's brokers, host:port [POSTROAD_KAFKA_BOOTSTRAP].", "ADDRESSES"),
        "topic-prefix": _SharedOption("Before topic and group names [POSTROAD_TOPIC_PREFIX].", "PREFIX"),
    },
    DATABASE: {
        "database": _SharedOption(
            "The database's SQLAlchemy URL. Better: POSTROAD_DATABASE_URL, since ps shows flags.", "URL"
        )
    },
}
_ALL: Mapping[str, _SharedOption] = {**_COMMON, **_USED[API], **_USED[KAFKA], **_USED[DATABASE]}


class CommandContext:
    """One run of a command: the options that it was given, and its output."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.out = Output(OutputFormat(given.get("output") or OutputFormat.TABLE))

    @cached_property
    def variables(self) -> dict[str, str]:
        """Every variable in its effective value; raises Failure for a bad file or profile."""
        flags = {name: _flag_text(value) for name, value in self._given.items() if name != "output"}
        return effective_variables(flags, os.environ)

    def settings(self) -> Settings:
        """Return the settings. Raises `pydantic.ValidationError`, which `main` explains."""
        return make_settings(self.variables)

    def channel(self) -> grpc.Channel:
        """Return a channel to the api. It is a context manager and adds the bearer token to every call."""
        from services.cli.channel import open_channel  # noqa: PLC0415

        return open_channel(with_token(self.variables))


def command(
    app: typer.Typer, name: str, *, uses: Sequence[str] = (), examples: str = ""
) -> Callable[
    [Callable[Concatenate[CommandContext, P], None]], Callable[Concatenate[CommandContext, P], None]
]:
    """Return a decorator that registers a function as a command of `app`. The module's docstring says how."""
    shared = dict(_COMMON)
    for connection in uses:
        shared |= _USED[connection]

    def register(
        function: Callable[Concatenate[CommandContext, P], None],
    ) -> Callable[Concatenate[CommandContext, P], None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        added = _parameters(shared, everywhere=False)

        @wraps(function)
        def run(_context: typer.Context, **arguments: Any) -> None:
            given = {name: arguments.pop(_parameter_name(name)) for name in shared}
            before = _context.find_root().obj or {}
            merged = before | {key: value for key, value in given.items() if value is not None}
            context = CommandContext(merged)
            try:
                function(context, **arguments)  # type: ignore[call-arg]
            except Exception as error:
                # Neither Kafka's errors nor `main` know which brokers were asked.
                if KAFKA not in uses or not is_kafka_error(error):
                    raise
                raise explain(error, context.settings().kafka_bootstrap) or error from None

        typers = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        _set_signature(run, [typers, *keyword, *added])
        app.command(name, help=_help_text(function, examples), no_args_is_help=False)(run)
        return function

    return register


def root(app: typer.Typer, text: str) -> None:
    """Accept the shared options before a command's name too. `text` is the app's help."""

    def callback(_context: typer.Context, **given: Any) -> None:
        _context.obj = {
            name: given[_parameter_name(name)] for name in _ALL if given[_parameter_name(name)] is not None
        }

    context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    _set_signature(callback, [context, *_parameters(_ALL, everywhere=True)])
    app.callback(help=text)(callback)


def _set_signature(function: Any, parameters: Sequence[inspect.Parameter]) -> None:
    # Typer reads a command's options from its function's signature and annotations.
    function.__signature__ = inspect.Signature(parameters, return_annotation=None)
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    function.__dict__.pop("__wrapped__", None)


def _parameters(options: Mapping[str, _SharedOption], *, everywhere: bool) -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            _parameter_name(name),
            kind,
            default=None,
            annotation=option.annotation(name, everywhere=everywhere),
        )
        for name, option in options.items()
    ]


def _parameter_name(name: str) -> str:
    return "shared_" + name.replace("-", "_")


def _flag_text(value: object) -> str | None:
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def _help_text(function: Callable[..., object], examples: str) -> str:
    # Rich keeps the line breaks of all paragraphs but the first.
    text = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
    lines = textwrap.dedent(examples).strip("\n").rstrip()
    if not lines:
        return text
    # In Rich's markup, square brackets need a backslash. It strips a common indentation, for some commands
    # only.
    return f"{text}\n\nExamples:\n\n" + lines.replace("[", r"\[")
