"""`postroad token`: the tokens file of the api."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from services.cli.command import CommandContext, command
from services.cli.errors import USAGE, Failure
from services.cli.output import Column, OutputRow
from services.cli.terminal import say
from services.cli.times import format_time, parse_time

if TYPE_CHECKING:
    from services.common.grants import Grant

__all__ = ["register"]

File: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--file", help="The tokens file [POSTROAD_TOKENS_FILE].", metavar="FILE", show_default=False
    ),
]
_COLUMNS = (
    Column("id"),
    Column("tenant", min_width=8),
    Column("scopes", min_width=12),
    Column("not_after", "not after", format=format_time),
    Column("state"),
)


def register(tokens: typer.Typer) -> None:
    """Add the commands to the group `token`."""

    @command(
        tokens,
        "new",
        examples="""
            postroad token new --tenant billing --scopes create,read --file tokens
            postroad token new --tenant ops --scopes read,operate --not-after +90d
        """,
    )
    def new(
        context: CommandContext,
        tenant: Annotated[str, typer.Option("--tenant", help="The token's tenant.", metavar="NAME")],
        scopes: Annotated[
            str,
            typer.Option("--scopes", help="Of create, read, cancel, operate, content.", metavar="SCOPE,..."),
        ],
        not_after: Annotated[
            str | None, typer.Option("--not-after", help="When it ends, such as 2027-01-31 or +90d.")
        ] = None,
        file: File = None,
    ) -> None:
        """Make a token and print it, once. The file has its digest alone.

        The api reads the file again within 5 s. `operate` is for operators: it reaches the tasks of all
        tenants, and does not show their addresses, subjects and bodies without `content`.
        """
        from services.common.operations.tokens import add_token  # noqa: PLC0415

        now = datetime.now(UTC)
        end = parse_time(not_after, now) if not_after else None
        if end is not None and end <= now:
            raise Failure(f"--not-after: {not_after} is over", USAGE)
        grant, token = add_token(_path(context, file), tenant, scopes, end)

        def show(_: OutputRow) -> None:
            say(f"This is the token {grant.id} of {grant.tenant}. Nothing shows it again.")
            print(token)

        context.out.one(_row(grant) | {"token": token}, show)

    @command(tokens, "list", examples="postroad token list --file tokens")
    def list_(context: CommandContext, file: File = None) -> None:
        """Show what each token may do, and until when. No token is shown."""
        from services.common.operations.tokens import list_grants  # noqa: PLC0415

        context.out.rows(map(_row, list_grants(_path(context, file))), _COLUMNS)

    @command(tokens, "revoke", examples="postroad token revoke 6f1c22d0 --file tokens")
    def revoke(
        context: CommandContext,
        id_: Annotated[str, typer.Argument(help="The token's id.", metavar="ID")],
        file: File = None,
    ) -> None:
        """Take a token out of the file. The api refuses it, and ends its open streams, within 5 s."""
        from services.common.operations.tokens import revoke_token  # noqa: PLC0415

        grant = revoke_token(_path(context, file), id_)
        context.out.one(_row(grant), lambda _: print(f"revoked {grant.id} of {grant.tenant}"))


def _path(context: CommandContext, file: str | None) -> Path:
    path = file or context.variables.get("POSTROAD_TOKENS_FILE")
    if not path:
        raise Failure("name the tokens file: --file, or POSTROAD_TOKENS_FILE", USAGE)
    return Path(path)


def _row(grant: Grant) -> dict[str, Any]:
    from services.common.grants import SCOPES  # noqa: PLC0415

    ends = grant.not_after != math.inf
    end = datetime.fromtimestamp(grant.not_after, UTC) if ends else None
    return {
        "id": grant.id,
        "tenant": grant.tenant,
        "scopes": ",".join(scope for scope in SCOPES if scope in grant.scopes),
        "not_after": end and end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "state": "over" if end and end <= datetime.now(UTC) else "valid",
    }
