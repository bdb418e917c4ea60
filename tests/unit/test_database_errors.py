"""The table of errors that pass, and the api's answer to each."""

from __future__ import annotations

import grpc
import pytest
from mysql.connector import errorcode
from mysql.connector.errors import get_mysql_exception
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import OperationalError

from services.api.database_threads import DatabaseThreads
from services.api.errors import StatusError
from services.common.database.errors import (
    ERRORS,
    TRANSIENT,
    ErrorCode,
    ErrorKind,
    error_numbers,
    is_conflict,
    is_transient,
)


def error(number: int) -> OperationalError:
    return OperationalError("SELECT 1", None, get_mysql_exception(number, msg="said so"))


def test_each_code_is_listed_once_with_its_reason_and_its_source() -> None:
    assert len({code.number for code in ERRORS}) == len(ERRORS)
    assert all(code.name and code.why and code.source for code in ERRORS)
    assert frozenset().union(*map(error_numbers, ErrorKind)) == TRANSIENT


@pytest.mark.parametrize("code", [code for code in ERRORS if code.source.startswith("MySQL")])
def test_mysqls_names_and_numbers_match(code: ErrorCode) -> None:
    name = code.name if hasattr(errorcode, code.name) else f"OBSOLETE_{code.name}"
    if not code.name.startswith("EE_"):
        assert getattr(errorcode, name) == code.number


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: str(code.number))
def test_a_listed_error_passes(code: ErrorCode) -> None:
    assert is_transient(error(code.number))
    assert is_conflict(error(code.number)) == (code.kind is ErrorKind.CONFLICT)


@pytest.mark.parametrize(
    "number",
    [1044, 1045, 1049, 1054, 1062, 1064, 1142, 1146, 1364, 1366, 1406, 1452, 2014, 3140, 3750, 9003, 9006],
)
def test_errors_of_a_statement_its_data_or_the_set_up_do_not_pass(number: int) -> None:
    assert not is_transient(error(number))


@pytest.mark.parametrize("code", ERRORS, ids=lambda code: str(code.number))
async def test_the_api_answers_unavailable_where_the_database_says_so(code: ErrorCode) -> None:
    threads = DatabaseThreads(create_engine("sqlite://"))

    def query(connection: Connection) -> None:
        raise error(code.number)

    with pytest.raises(StatusError) as caught:
        await threads.run(query)
    threads.close()
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
