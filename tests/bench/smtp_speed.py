"""What the sender's SMTP client costs: CPU a mail, against a sink in another process.

``python -m tests.bench smtp_speed [MAILS]`` prints a line for each size and number of sessions.
"""

import asyncio
import subprocess
import sys
import time

import uvloop

from services.sender.message import build
from services.sender.replies import Sent
from services.sender.smtp_pool import Limits, Relay, SmtpPool, Tls

__all__: list[str] = []


async def _measure(port: int, mails: int, sessions: int, size: int) -> None:
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

    async def send(count: int) -> None:
        for _ in range(count):
            result = await pool.send("shop@example.org", "ann@example.net", message, lambda: True)
            assert isinstance(result, Sent), result

    workers = sessions * 2
    await asyncio.gather(*(send(10) for _ in range(workers)))
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(send(mails // workers) for _ in range(workers)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done = mails // workers * workers
    print(
        f"{sessions:3} sessions, {len(message):6} bytes: "
        f"{cpu / done * 1e6:6.1f} us of CPU a mail, {done / wall:8.0f} mails/s"
    )
    await pool.close()


def main() -> None:
    mails = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    with subprocess.Popen([sys.executable, "-m", "tests.bench.smtp_sink"], stdout=subprocess.PIPE) as sink:
        try:
            assert sink.stdout is not None
            port = int(sink.stdout.readline())
            for sessions in (1, 4, 20):
                for size in (500, 20_000):
                    uvloop.run(_measure(port, mails, sessions, size))
        finally:
            sink.terminate()


if __name__ == "__main__":
    main()
