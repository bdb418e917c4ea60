"""What hand-written code costs beside a library that does the same (ADR 26, 27 and 36).

``python -m tests.bench.alternatives mime`` compares `message.build` with the standard library's EmailMessage.
``... sql URL`` compares raw SQL with SQLAlchemy's expressions, on the migrated database at URL. ``... smtp``
compares `SmtpPool` with aiosmtplib, which must be on PYTHONPATH: the project does not install it.

The two sides of a pair take turns in one process. A line shows both sides' CPU time and the ratio's median.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from itertools import chain

import uvloop
from sqlalchemy import Connection, insert, select
from sqlalchemy.dialects import mysql

from services.common.database.bulk import execute_rows, placeholders, select_rows
from services.common.database.engine import make_engine
from services.common.database.tables import deliveries
from services.common.deliveries.decide import Delivery
from services.common.deliveries.rows import COLUMNS, INSERT_NEW
from services.sender.message import build
from services.sender.replies import SendResult, Sent
from services.sender.smtp_pool import Limits, OutgoingMail, Relay, SmtpPool, Tls

__all__: list[str] = []

ROUNDS = 11
FROM, TO, SUBJECT = "shop@example.org", "ann@example.net", "Your order"
MESSAGE_ID = "<0190f5e0-0000-7000-8000-000000000001@example.org>"


def _report(name: str, ours: list[float], theirs: list[float], unit: str) -> None:
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours) * 1e6, statistics.median(theirs) * 1e6
    print(f"{name:46} {a:8.1f} {b:8.1f} us of CPU a {unit}, ratio {ratio:5.2f}", flush=True)


def _cpu(call: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def _compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], count: int, *, rows: int = 0
) -> None:
    ours(), theirs()
    pairs = [(_cpu(ours, count), _cpu(theirs, count)) for _ in range(ROUNDS)]
    per = rows or 1
    _report(name, [a / per for a, _ in pairs], [b / per for _, b in pairs], "row" if rows else "mail")


# --- MIME ---


def _email_message(text: str | None, html: str | None) -> bytes:
    message = EmailMessage(policy=SMTP)
    message["Date"] = format_datetime(datetime.fromtimestamp(1_700_000_000))
    message["From"], message["To"], message["Subject"] = f"Shop <{FROM}>", TO, SUBJECT
    message["Message-ID"] = MESSAGE_ID
    if text is not None:
        message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    return message.as_bytes()


def _built(text: str | None, html: str | None) -> bytes:
    return build(
        message_id=MESSAGE_ID, from_addr=FROM, from_name="Shop", to_addr=TO, subject=SUBJECT,
        date=1_700_000_000, text=text, html=html,
    )  # fmt: skip


def _mime() -> None:
    for size, count in ((500, 200), (20_000, 40)):
        ascii_text = ("A line of an ordinary mail.\n" * (size // 28 + 1))[:size]
        text = ascii_text.replace("ordinary", "gewöhnlichen")
        html = f"<p>{text}</p>"
        for name, args in (("ASCII text", (ascii_text, None)), ("text and HTML in UTF-8", (text, html))):
            _compare(f"{name}, {size} characters",
                     lambda a=args: _built(*a), lambda a=args: _email_message(*a), count)  # fmt: skip


# --- SQL ---


def _rows(count: int) -> list[Delivery]:
    now = datetime(2026, 1, 1)
    return [
        Delivery(os.urandom(16), "sending", 0, 1, 0, os.urandom(16), now, 0, 0, "", "", "", MESSAGE_ID)
        for _ in range(count)
    ]


def _sql(url: str) -> None:
    engine = make_engine(url, pool_size=1)
    with engine.connect() as connection:
        _insert(connection)
        _select(connection, 500, 20)
        _select(connection, 1, 500)
    engine.dispose()


def _insert(connection: Connection) -> None:
    rows = _rows(500)
    values = [dict(zip(COLUMNS.split(", "), row, strict=True)) for row in rows]
    ignore = insert(deliveries).prefix_with("IGNORE", dialect="mysql")

    def raw() -> None:
        execute_rows(connection, INSERT_NEW, rows)
        connection.rollback()

    def multi_values() -> None:
        connection.execute(ignore.values(values))
        connection.rollback()

    def many() -> None:
        connection.execute(ignore, values)
        connection.rollback()

    upsert = mysql.insert(deliveries)
    upsert = upsert.on_duplicate_key_update(state=upsert.inserted.state)

    def raw_upsert() -> None:
        tail = "ON DUPLICATE KEY UPDATE state = VALUES(state)"
        execute_rows(connection, INSERT_NEW.replace(" IGNORE", ""), rows, tail)
        connection.rollback()

    def many_upsert() -> None:
        connection.execute(upsert, values)
        connection.rollback()

    row = f"({placeholders(len(rows[0]))})"

    def driver() -> None:
        parameters = tuple(chain.from_iterable(rows))
        connection.exec_driver_sql(f"{INSERT_NEW} {','.join([row] * len(rows))}", parameters)
        connection.rollback()

    _compare("INSERT IGNORE of 500 rows, exec_driver_sql", raw, driver, 5, rows=500)
    _compare("INSERT IGNORE of 500 rows, insert().values()", raw, multi_values, 3, rows=500)
    _compare("INSERT IGNORE of 500 rows, executemany", raw, many, 5, rows=500)
    _compare("upsert of 500 rows, executemany", raw_upsert, many_upsert, 5, rows=500)


def _select(connection: Connection, count: int, repeats: int) -> None:
    rows = _rows(count)
    execute_rows(connection, INSERT_NEW, rows)
    ids = tuple(row.task_id for row in rows)
    query = f"SELECT {COLUMNS} FROM deliveries WHERE task_id IN ({placeholders(count)})"

    def raw() -> None:
        assert len([Delivery(*row) for row in select_rows(connection, query, ids)]) == count

    def driver() -> None:
        found = connection.exec_driver_sql(query, ids).all()
        assert len([Delivery(*row) for row in found]) == count

    def expression() -> None:
        found = connection.execute(select(deliveries).where(deliveries.c.task_id.in_(ids))).all()
        assert len([Delivery(*row) for row in found]) == count

    _compare(f"SELECT of {count} rows by id, exec_driver_sql", raw, driver, repeats, rows=count)
    _compare(f"SELECT of {count} rows by id, select().where()", raw, expression, repeats, rows=count)
    connection.rollback()


# --- SMTP ---


async def _timed(send: Callable[[int], Awaitable[None]], sessions: int, mails: int) -> float:
    start = time.process_time()
    await asyncio.gather(*(send(mails // sessions) for _ in range(sessions)))
    return (time.process_time() - start) / (mails // sessions * sessions)


async def _smtp(port: int, sessions: int, size: int, mails: int) -> None:
    import aiosmtplib  # type: ignore[import-not-found]

    pool = SmtpPool(
        Relay("127.0.0.1", port, tls=Tls.NONE), limits=Limits(sessions=sessions, mails_per_session=10**9)
    )
    message = _built(("A line of an ordinary mail.\n" * (size // 28 + 1))[:size], None)
    clients = [aiosmtplib.SMTP(hostname="127.0.0.1", port=port, use_tls=False, start_tls=False)
               for _ in range(sessions)]  # fmt: skip
    for client in clients:
        await client.connect()
    free = list(clients)

    async def ours(count: int) -> None:
        for _ in range(count):
            result: asyncio.Future[SendResult] = asyncio.get_running_loop().create_future()
            pool.submit(OutgoingMail(FROM, TO, message, lambda: True, result.set_result))
            assert isinstance(await result, Sent)

    async def theirs(count: int) -> None:
        client = free.pop()
        for _ in range(count):
            await client.sendmail(FROM, [TO], message)
        free.append(client)

    await ours(10), await theirs(10)
    pairs = [
        (await _timed(ours, sessions, mails), await _timed(theirs, sessions, mails)) for _ in range(ROUNDS)
    ]
    _report(f"{sessions} sessions, {len(message)} bytes",
            [a for a, _ in pairs], [b for _, b in pairs], "mail")  # fmt: skip
    await pool.close()
    for client in clients:
        await client.quit()


def main() -> None:
    match sys.argv[1:]:
        case ["mime"]:
            _mime()
        case ["sql", url]:
            _sql(url)
        case ["smtp"]:
            with subprocess.Popen(
                [sys.executable, "-m", "tests.bench.smtp_sink"], stdout=subprocess.PIPE
            ) as sink:
                assert sink.stdout is not None
                port = int(sink.stdout.readline())
                try:
                    for sessions in (1, 20):
                        for size, mails in ((500, 1000), (20_000, 400)):
                            uvloop.run(_smtp(port, sessions, size, mails))
                finally:
                    sink.terminate()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
