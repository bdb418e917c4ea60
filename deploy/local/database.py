"""The database server: MySQL or MariaDB. It syncs each commit, and listens on loopback by TCP only."""

import os
import shutil
import tempfile
from pathlib import Path

import mysql.connector

from deploy.local import security
from deploy.local.commands import SetupError
from deploy.local.component import Component
from deploy.local.database_tree import Server, find_server, template_path
from deploy.local.files import write_whole
from deploy.local.layout import Layout
from deploy.local.ports import HOST
from deploy.local.state import StackState

__all__ = ["database_component"]

NAME = "mysql"
FLAGS = (
    f"--bind-address={HOST}",
    "--skip-name-resolve",
    "--disable-log-bin",
    "--transaction-isolation=READ-COMMITTED",
    "--innodb-flush-log-at-trx-commit=1",
    "--innodb-buffer-pool-size=128M",
    "--character-set-server=utf8mb4",
    "--collation-server=utf8mb4_general_ci",
    "--max-connections=400",
    # MariaDB's default. MySQL's is four times as large.
    "--max-allowed-packet=16M",
)
# Statement digests cost CPU, so they are on for diagnosis only.
DIGESTS = ("--performance-schema=ON", "--performance-schema-consumer-statements-digest=ON")
NO_DIGESTS = ("--performance-schema=OFF",)
KIND_FLAGS = {
    # Managed MySQL demands a primary key of every table; MariaDB has no such setting.
    "mysql": (
        "--sql-require-primary-key=ON",
        "--mysqlx=OFF",
        "--secure-file-priv=NULL",
        "--innodb-redo-log-capacity=256M",
    ),
    "mariadb": ("--innodb-log-file-size=256M",),
}


def _first_statements(password: str) -> str:
    """Return what the server runs at each start before it listens: it makes the database, locks root out."""
    return "\n".join(
        (
            "CREATE DATABASE IF NOT EXISTS postroad CHARACTER SET utf8mb4;",
            f"CREATE USER IF NOT EXISTS 'postroad'@'%' IDENTIFIED BY '{password}';",
            "GRANT ALL ON *.* TO 'postroad'@'%' WITH GRANT OPTION;",
            "ALTER USER 'root'@'localhost' ACCOUNT LOCK;",
            "",
        )
    )


def _prepare(server: Server, data: Path, statements: Path, password: str) -> None:
    if not data.exists():
        template = template_path(server)
        if not template.exists():
            raise SetupError("the database is not installed: run `make setup`")
        data.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{data.name}-", dir=data.parent))
        shutil.copytree(template / "data", partial, dirs_exist_ok=True, symlinks=True)
        partial.rename(data)
    write_whole(statements, _first_statements(password))
    # A killed server leaves its socket, and its process id in a lock. Another process may have that id by
    # now.
    for left in ("sock", "sock.lock", "pid"):
        (data / f"server.{left}").unlink(missing_ok=True)


def database_component(layout: Layout, state: StackState) -> Component:
    """Return the component of the database server. Raises SetupError when it is not installed."""
    server = find_server(state.database)
    if server is None:
        raise SetupError(f"{state.database} is not installed: run `make setup`")
    port = state.port(NAME, "sql")
    pair = security.certificate(state, security.SERVER)
    secure = (
        "--require-secure-transport=ON",
        f"--ssl-ca={security.authority(state)}",
        f"--ssl-cert={pair}",
        f"--ssl-key={pair}",
    )
    data = layout.data(state.database)
    statements = data.with_suffix(".sql")

    def is_ready() -> bool:
        try:
            with mysql.connector.connect(
                host=HOST, port=port, user="postroad", password=state.password, connection_timeout=2
            ) as connection:
                return bool(connection.is_connected())
        except mysql.connector.Error:
            return False

    return Component(
        name=NAME,
        argv=(
            *server.argv,
            *FLAGS,
            *(DIGESTS if os.environ.get("POSTROAD_LOCAL_STATEMENT_DIGESTS") else NO_DIGESTS),
            *KIND_FLAGS[server.kind],
            *(secure if state.secure else ()),
            *(["--user=root"] if os.geteuid() == 0 else []),
            f"--datadir={data}",
            # Relative to the data directory, since the path of a socket has at most 107 bytes.
            "--socket=server.sock",
            "--pid-file=server.pid",
            f"--port={port}",
            f"--init-file={statements}",
        ),
        address=f"{HOST}:{port}",
        is_ready=is_ready,
        prepare=lambda: _prepare(server, data, statements, state.password),
        grace=60,
    )
