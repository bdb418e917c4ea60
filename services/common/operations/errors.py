"""The errors of operations. Each one's text is one line for people, without a full stop."""

from __future__ import annotations

__all__ = ["InvalidDatabaseUrl", "InvalidOption", "NotFound", "OperationError"]


class OperationError(Exception):
    """An operation cannot do what it is asked for."""


class NotFound(OperationError):
    """The operation needs something, such as a topic, that does not exist."""


class InvalidDatabaseUrl(OperationError):
    """The setting `database_url` is no URL of a MySQL or MariaDB database. The text holds no password."""


class InvalidOption(OperationError):
    """An option has a value that the operation does not take. `option` is the option's name."""

    def __init__(self, option: str, problem: object) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = str(problem)
