"""`postroad acl print`: the rules that Kafka needs where it denies by default."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from services.cli.command import KAFKA, CommandContext, command
from services.cli.errors import USAGE, Failure
from services.cli.output import Column

__all__ = ["register"]

_COLUMNS = (
    Column("program"),
    Column("principal", rank=1),
    Column("operations", min_width=8),
    Column("resource"),
    Column("pattern", rank=2),
    Column("name"),
)


def register(app: typer.Typer) -> None:
    """Add the group `acl` to the app."""
    acl = typer.Typer(no_args_is_help=True, help="Kafka's access control lists.")
    app.add_typer(acl, name="acl")

    @command(
        acl,
        "print",
        uses=(KAFKA,),
        examples="""
            postroad acl print
            postroad acl print --topic-prefix staging. -o json
            postroad acl print --commands --principal "User:{program}"
        """,
    )
    def print_(
        context: CommandContext,
        commands: Annotated[
            bool, typer.Option("--commands", help="Lines for a shell that runs kafka-acls.sh.")
        ] = False,
        principal: Annotated[
            str, typer.Option("--principal", help="A program's principal in Kafka.", metavar="TEXT")
        ] = "User:postroad-{program}",
    ) -> None:
        """Show the least that each service, and the operator's commands, must be allowed to do in Kafka.

        It connects to nothing. `operator` is who runs lag, replay, rebuild and dead; `topics` is who runs
        topics.

        In the lines of --commands, BOOTSTRAP is the variable with the brokers, and CONFIG the one with an
        administrator's file for --command-config.
        """
        from services.common.operations.acls import kafka_acls_options, required_acls  # noqa: PLC0415

        if "{program}" not in principal:
            raise Failure(
                "--principal must contain {program}: each program has a principal of its own", USAGE
            )
        rows = []
        for rule in required_acls(context.settings().topic_prefix):
            name = principal.replace("{program}", rule.program)
            if commands:
                options = shlex.join(kafka_acls_options(rule, name))
                print(f'kafka-acls.sh --bootstrap-server "$BOOTSTRAP" --command-config "$CONFIG" {options}')
            rows.append(
                {
                    "program": rule.program,
                    "principal": name,
                    "operations": list(rule.operations),
                    "resource": rule.resource,
                    "pattern": rule.pattern,
                    "name": rule.name,
                }
            )
        if not commands:
            context.out.rows(rows, _COLUMNS)
