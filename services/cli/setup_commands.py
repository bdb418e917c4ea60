"""`postroad migrate` and `postroad topics apply`: what an installation needs before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.errors import FAILED
from services.cli.frame import DATABASE, KAFKA, Frame, Yes, command
from services.cli.terminal import confirm, say

if TYPE_CHECKING:
    from services.common.config import Settings

__all__ = ["register"]


def register(app: typer.Typer, topics: typer.Typer) -> None:
    """Add the commands to the app and to its group `topics`."""

    @command(app, "migrate", uses=(DATABASE,), examples="postroad migrate --env-file .local/stack.env")
    def migrate(frame: Frame) -> None:
        """Bring the database to this version's tables. Run it before the services of a new version start.

        A database that a later version has migrated serves this one too: nothing is done then.
        """
        from services.cli.database import url_of  # noqa: PLC0415
        from services.common.migrations import migrate as run  # noqa: PLC0415

        migrated = run(url_of(frame.settings()))
        line = "up to date" if migrated else "newer than this version, which goes on with it as it is"
        frame.out.one({"migrated": migrated}, lambda _: print(f"The database is {line}."))

    @command(
        topics,
        "apply",
        uses=(KAFKA,),
        examples="""
            postroad topics apply
            POSTROAD_REPLICATION=3 postroad topics apply -o json
            POSTROAD_PARTITIONS=24 postroad topics apply --grow
        """,
    )
    def apply(
        frame: Frame,
        *,
        grow: Annotated[
            bool, typer.Option("--grow", help="Give topics that have too few partitions the missing ones.")
        ] = False,
        yes: Yes = False,
    ) -> None:
        """Create the topics that are missing, and fail where one that exists is not as it must be.

        Partitions, replicas and delays are those of the settings (POSTROAD_PARTITIONS, POSTROAD_REPLICATION,
        POSTROAD_VALIDATOR_DELAYS, POSTROAD_SENDER_DELAYS). A topic that keeps its records too short a time is
        made to keep them longer. Of all else that exists --grow alone changes anything. It asks first: Kafka
        never takes a partition back. docs/operations.md says what to heed.
        """
        from services.common import kafka_admin  # noqa: PLC0415

        settings = frame.settings()
        rows = _grown(settings, yes) if grow else []
        applied = kafka_admin.apply(settings)
        rows += [{"topic": name, "state": "created"} for name in applied.created]
        rows += [{"topic": name, "state": "kept longer"} for name in applied.raised]
        for difference in applied.differences:
            name, _, detail = difference.partition(": ")
            rows.append({"topic": name, "state": "differs", "detail": detail})
        if not frame.out.is_table:
            frame.out.rows(rows, ())
        for row in rows:
            if row["state"] == "differs":
                say(f"differs {row['topic']}: {row['detail']}")
            elif frame.out.is_table:
                print(row["state"], row["topic"])
        if applied.differences:
            raise typer.Exit(FAILED)
        if frame.out.is_table:
            print("The topics are as they must be.")


def _grown(settings: Settings, yes: bool) -> list[dict[str, str]]:
    """Grow the topics that are too small, if the user agrees; return a row for each."""
    from services.common import kafka_admin  # noqa: PLC0415

    small = kafka_admin.too_small(settings)
    if not small:
        return []
    has = "-".join(str(number) for number in sorted({min(small.values()), max(small.values())}))
    confirm(f"Grow {len(small)} topics from {has} to {settings.partitions} partitions, for good?", yes)
    return [{"topic": name, "state": "grown"} for name in kafka_admin.grow(settings)]
