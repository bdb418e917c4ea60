"""`postroad migrate` and `postroad topics apply`: what an installation needs before it runs."""

from __future__ import annotations

import typer

from services.cli.errors import FAILED
from services.cli.frame import DATABASE, KAFKA, Frame, command
from services.cli.output import Column, Form
from services.cli.terminal import say

__all__ = ["register"]


def register(app: typer.Typer, topics: typer.Typer) -> None:
    """Add the commands to the app and to its group `topics`."""

    @command(app, "migrate", uses=(DATABASE,), examples="postroad migrate --env-file .local/stack.env")
    def migrate(frame: Frame) -> None:
        """Bring the database to this version's tables. Run it before the services of a new version start."""
        from services.common.migrations import migrate as run  # noqa: PLC0415

        run(frame.settings().database_url)
        frame.out.one({"migrated": True}, lambda _: print("The database is up to date."))

    @command(
        topics,
        "apply",
        uses=(KAFKA,),
        examples="""
            postroad topics apply
            POSTROAD_REPLICATION=3 postroad topics apply -o json
        """,
    )
    def apply(frame: Frame) -> None:
        """Create the topics that are missing, and fail where one that exists is not as it must be.

        Partitions, replicas and delays are those of the settings (POSTROAD_PARTITIONS, POSTROAD_REPLICATION,
        POSTROAD_VALIDATOR_DELAYS, POSTROAD_SENDER_DELAYS). What exists is changed in no way.
        """
        from services.common import kafka_admin  # noqa: PLC0415

        applied = kafka_admin.apply(frame.settings())
        rows = [{"topic": name, "state": "created"} for name in applied.created]
        for difference in applied.differences:
            name, _, detail = difference.partition(": ")
            rows.append({"topic": name, "state": "differs", "detail": detail})
        if frame.out.form is not Form.TABLE:
            frame.out.rows(rows, [Column("topic"), Column("state"), Column("detail")])
        else:
            for name in applied.created:
                print(f"created {name}")
        if applied.differences:
            for difference in applied.differences:
                say(f"differs {difference}")
            raise typer.Exit(FAILED)
        if frame.out.form is Form.TABLE:
            print("The topics are as they must be.")
