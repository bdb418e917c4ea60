"""The `postroad` command. Results go to stdout, the rest to stderr.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 denied, 5 unavailable; 130 after Ctrl-C.
A command's module has a `register(app)`; it is called here. services/cli/command.py says how one is made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback

import typer

from services.cli import (
    acl_command,
    change_commands,
    create_command,
    dead_commands,
    get_command,
    lag_command,
    list_command,
    rebuild_command,
    replay_command,
    setup_commands,
    token_commands,
    watch_command,
)
from services.cli.command import root
from services.cli.errors import FAILED, INTERRUPTED, OK, explain

__all__ = ["app", "main"]

HELP = """Run Postroad: its tasks, its topics, its tables.

Connections come from flags, the environment, --env-file or a profile of the config file, in this order.
Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 denied, 5 unavailable, 130 interrupted.
"""

app = typer.Typer(name="postroad", no_args_is_help=True, rich_markup_mode="rich")
root(app, HELP)
topics = typer.Typer(no_args_is_help=True, help="The Kafka topics.")
app.add_typer(topics, name="topics")
tokens = typer.Typer(no_args_is_help=True, help="The tokens of the api's clients.")
app.add_typer(tokens, name="token")

for module in (
    create_command,
    list_command,
    get_command,
    watch_command,
    change_commands,
    lag_command,
    replay_command,
    rebuild_command,
    dead_commands,
    acl_command,
):
    module.register(app)
setup_commands.register(app, topics)
token_commands.register(tokens)


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    code = _run()
    # What still runs at the exit of an interrupted command is ended by a second Ctrl-C, without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _run() -> int:
    try:
        code = app(prog_name="postroad", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            # Typer makes an exit of Ctrl-C.
            print("postroad: interrupted", file=sys.stderr)
        return code if isinstance(code, int) else OK
    except BrokenPipeError:
        # Whoever read the result has enough of it. Typer too exits with 1 then.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        failure = explain(error)
        if failure is None:
            if os.environ.get("POSTROAD_TRACEBACK"):
                traceback.print_exc()
            line = f"{type(error).__name__}: {error} (set POSTROAD_TRACEBACK=1 to see where)"
            print("postroad: " + " ".join(line.split()), file=sys.stderr)
            return FAILED
        if failure.line:
            print(f"postroad: {failure.line}", file=sys.stderr)
        return failure.code
