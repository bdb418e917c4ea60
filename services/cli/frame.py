'''What every command stands on: its options, its connections, its output.

A command is a function whose first parameter is the `Frame`; the others are Typer's as usual:

    def register(app: typer.Typer) -> None:
        @command(app, "lag", uses=(KAFKA,), examples="""
            postroad lag
            postroad lag --partitions -o json
        """)
        def lag(frame: Frame, partitions: Annotated[bool, typer.Option("--partitions")] = False) -> None:
            """Show how far each stage is behind."""
            settings = frame.settings()                 # services.common.config.Settings
            frame.out.rows(rows, COLUMNS)               # or .one(row), .lines(COLUMNS)(row)

- `uses` names the connections whose flags the command takes: API, KAFKA, DATABASE. `-o`, `--profile`,
  `--config` and `--env-file` come with every command; all may stand before or after its name. Lines of
  `examples` and of its table in an 80 column terminal: 76 characters at most.
- It raises `Failure(line, code)` of services/cli/errors.py, or lets what its libraries raise pass: main makes
  one line and the right exit code of it. An unreachable server is such an error; so is Ctrl-C (catch
  KeyboardInterrupt where something must be put in order, and raise Failure(..., INTERRUPTED)). It prints to
  stderr by `say`, asks by `confirm(question, yes)` (declare `yes: Yes = False`) and shows `progress`, all of
  services/cli/terminal.py. What a command does beyond that is in services/common/operations, which neither
  prints nor asks.
- What takes long to import (grpc, confluent_kafka, sqlalchemy, services.common) is imported inside the
  function: `postroad --help` loads every command's module.
- Its module's `register` is called in services/cli/main.py, where a group's `typer.Typer` is made too.
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

from services.cli.errors import explain, is_kafkas
from services.cli.output import Form, Output
from services.cli.settings import settings_of, values

if TYPE_CHECKING:
    import grpc

    from services.common.config import Settings

__all__ = ["API", "DATABASE", "KAFKA", "Frame", "Yes", "command", "root"]

P = ParamSpec("P")

API, KAFKA, DATABASE = "api", "kafka", "database"
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass(frozen=True, slots=True)
class _Shared:
    """An option that commands share. `kind` is its values' type; `plain`: each command's help has it."""

    text: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    kind: Any = str
    plain: bool = True

    def annotation(self, name: str, *, everywhere: bool) -> Any:
        option = typer.Option(
            *(self.flags or (f"--{name}",)),
            # Square brackets are Rich's markup.
            help=self.text.replace("[", r"\["),
            metavar=self.metavar,
            hidden=not (self.plain or everywhere),
            rich_help_panel="Output and connections",
            show_default=False,
        )
        return Annotated[self.kind | None, option]


_COMMON: Mapping[str, _Shared] = {
    "output": _Shared("The form of the result: table, json or jsonl.", "FORM", ("--output", "-o"), Form),
    "profile": _Shared("A profile of the config file [POSTROAD_PROFILE].", "NAME"),
    "config": _Shared(
        "The config file [POSTROAD_CONFIG], otherwise ~/.config/postroad/config.toml.", "FILE", plain=False
    ),
    "env-file": _Shared(
        "A file of NAME=value lines; the environment wins [POSTROAD_ENV_FILE].", "FILE", plain=False
    ),
}
_USED: Mapping[str, Mapping[str, _Shared]] = {
    API: {
        "api": _Shared("The api, host:port [POSTROAD_API].", "ADDRESS"),
        "token": _Shared("The bearer token. Better: POSTROAD_TOKEN, since ps shows flags.", "TOKEN"),
        "tls": _Shared("Whether the api is behind TLS [POSTROAD_TLS].", None, ("--tls/--no-tls",), bool),
    },
    KAFKA: {
        "kafka": _Shared("Kafka's brokers, host:port [POSTROAD_KAFKA_BOOTSTRAP].", "ADDRESSES"),
        "topic-prefix": _Shared("Before topic and group names [POSTROAD_TOPIC_PREFIX].", "PREFIX"),
    },
    DATABASE: {"database": _Shared("The database's SQLAlchemy URL [POSTROAD_DATABASE_URL].", "URL")},
}
_ALL: Mapping[str, _Shared] = {**_COMMON, **_USED[API], **_USED[KAFKA], **_USED[DATABASE]}


class Frame:
    """One run of a command: what it was given, and where its result goes."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.out = Output(Form(given.get("output") or Form.TABLE))

    @cached_property
    def values(self) -> dict[str, str]:
        """Every variable in its effective value; raises Failure for a bad file or profile."""
        flags = {name: _flag(value) for name, value in self._given.items() if name != "output"}
        return values(flags, os.environ)

    def settings(self) -> Settings:
        """Return the settings; raises `pydantic.ValidationError`, which main explains."""
        return settings_of(self.values)

    def channel(self) -> grpc.Channel:
        """Return a channel to the api, with the bearer token on every call; a context manager."""
        from services.cli.channel import open_channel  # noqa: PLC0415

        return open_channel(self.values)


def command(
    app: typer.Typer, name: str, *, uses: Sequence[str] = (), examples: str = ""
) -> Callable[[Callable[Concatenate[Frame, P], None]], Callable[Concatenate[Frame, P], None]]:
    """Register a function as a command of `app`; see the top of this module."""
    shared = dict(_COMMON)
    for connection in uses:
        shared |= _USED[connection]

    def register(function: Callable[Concatenate[Frame, P], None]) -> Callable[Concatenate[Frame, P], None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        added = _parameters(shared, everywhere=False)

        @wraps(function)
        def run(_context: typer.Context, **arguments: Any) -> None:
            given = {name: arguments.pop(_python(name)) for name in shared}
            before = _context.find_root().obj or {}
            merged = before | {key: value for key, value in given.items() if value is not None}
            frame = Frame(merged)
            try:
                function(frame, **arguments)  # type: ignore[call-arg]
            except Exception as error:
                # Kafka's errors do not say whom they are about, and main does not know it.
                if KAFKA not in uses or not is_kafkas(error):
                    raise
                raise explain(error, frame.settings().kafka_bootstrap) or error from None

        context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        _sign(run, [context, *keyword, *added])
        app.command(name, help=_help(function, examples), no_args_is_help=False)(run)
        return function

    return register


def root(app: typer.Typer, text: str) -> None:
    """Let the shared options stand before a command's name too."""

    def callback(_context: typer.Context, **given: Any) -> None:
        _context.obj = {name: given[_python(name)] for name in _ALL if given[_python(name)] is not None}

    context = inspect.Parameter("_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    _sign(callback, [context, *_parameters(_ALL, everywhere=True)])
    app.callback(help=text)(callback)


def _sign(function: Any, parameters: Sequence[inspect.Parameter]) -> None:
    # Typer makes a command's options from its function's signature and annotations.
    function.__signature__ = inspect.Signature(parameters, return_annotation=None)
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    function.__dict__.pop("__wrapped__", None)


def _parameters(options: Mapping[str, _Shared], *, everywhere: bool) -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            _python(name), kind, default=None, annotation=option.annotation(name, everywhere=everywhere)
        )
        for name, option in options.items()
    ]


def _python(name: str) -> str:
    return "frame_" + name.replace("-", "_")


def _flag(value: object) -> str | None:
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def _help(function: Callable[..., object], examples: str) -> str:
    # Rich keeps the line breaks of all paragraphs but the first.
    text = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
    lines = textwrap.dedent(examples).strip("\n").rstrip()
    if not lines:
        return text
    # Square brackets are Rich's markup; an indentation of all lines it would take away from some commands.
    return f"{text}\n\nExamples:\n\n" + lines.replace("[", r"\[")
