"""The users of deploy/mysql/users.sql, in a database of any name."""

import re
from collections.abc import Iterator, Mapping

from deploy.local.layout import ROOT

__all__ = ["USERS", "user_statements"]

SCRIPT = ROOT / "deploy/mysql/users.sql"
USERS = ("migrate", "api", "sender", "status", "operator")
"""The users that the script creates, without `postroad_`."""


def user_statements(database: str, passwords: Mapping[str, str]) -> Iterator[str]:
    """Yield the statements that create these users, let them into a database and give them passwords.

    The database has the tables already. `passwords` are by the names of USERS, in letters and digits.
    """
    text = re.sub("^--.*", "", SCRIPT.read_text(), flags=re.MULTILINE)
    for statement in filter(None, map(str.strip, text.split(";"))):
        [user] = re.findall(r"'postroad_(\w+)'@'%'", statement)
        if user in passwords:
            yield re.sub(r"(?<= ON )postroad\.", f"`{database}`.", " ".join(statement.split()))
    for user, password in passwords.items():
        yield f"ALTER USER 'postroad_{user}'@'%' IDENTIFIED BY '{password}' ACCOUNT UNLOCK"
