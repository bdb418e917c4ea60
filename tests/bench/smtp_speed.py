"""What the sender's SMTP client costs: CPU a mail, of the client and of a sink in another process.

``python -m tests.bench smtp_speed [MAILS]`` prints a line for each size and number of sessions. Twice as many
mails as sessions are under way, so that one waits for each session.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from services.sender.message import build
from services.sender.replies import SendResult, Sent
from services.sender.smtp_pool import Limits, OutgoingMail, Relay, SmtpPool, Tls

__all__: list[str] = []


class _Load:
    """Submits mails, each as soon as an earlier one has its result."""

    def __init__(self, pool: SmtpPool, message: bytes) -> None:
        self._pool, self._message = pool, message
        self._left = self._under_way = 0
        self._done = asyncio.Event()

    async def send(self, mails: int, under_way: int) -> None:
        """Send so many mails, at most so many at a time."""
        self._left, self._under_way = mails, 0
        self._done.clear()
        for _ in range(min(mails, under_way)):
            self._submit()
        await self._done.wait()

    def _submit(self) -> None:
        self._left -= 1
        self._under_way += 1
        self._pool.submit(
            OutgoingMail("shop@example.org", "ann@example.net", self._message, lambda: True, self._take)
        )

    def _take(self, result: SendResult) -> None:
        assert isinstance(result, Sent), result
        self._under_way -= 1
        if self._left:
            self._submit()
        elif not self._under_way:
            self._done.set()


async def _measure(port: int, sink: int, mails: int, sessions: int, size: int) -> None:
    pool = SmtpPool(
        Relay("127.0.0.1", port, tls=Tls.NONE), limits=Limits(sessions=sessions, mails_per_session=10**9)
    )
    message = build(
        message_id="<0190f5e0-0000-7000-8000-000000000001@example.org>",
        from_addr="shop@example.org",
        to_addr="ann@example.net",
        subject="Your order",
        date=1_700_000_000,
        text=("A line of an ordinary mail.\n" * (size // 28 + 1))[:size],
    )
    load = _Load(pool, message)
    await load.send(20 * sessions, 2 * sessions)
    wall, cpu, other = time.perf_counter(), time.process_time(), _cpu_seconds(sink)
    await load.send(mails, 2 * sessions)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    other = _cpu_seconds(sink) - other
    print(
        f"{sessions:3} sessions, {len(message):6} bytes: {cpu / mails * 1e6:6.1f} us of CPU a mail,"
        f" of the sink {other / mails * 1e6:6.1f}, {mails / wall:8.0f} mails/s",
        flush=True,
    )
    await pool.close()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    mails = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    with subprocess.Popen([sys.executable, "-m", "tests.bench.smtp_sink"], stdout=subprocess.PIPE) as sink:
        try:
            assert sink.stdout is not None
            port = int(sink.stdout.readline())
            for sessions in (1, 4, 20):
                for size in (500, 20_000):
                    uvloop.run(_measure(port, sink.pid, mails, sessions, size))
        finally:
            sink.terminate()


if __name__ == "__main__":
    main()
