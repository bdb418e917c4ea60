"""`python3 -m deploy.local.catcher` runs a catcher. It prints `listening on HOST:PORT` once it listens."""

import argparse
import asyncio
import gc
import os
import signal
import ssl
from pathlib import Path

import uvloop

from deploy.local.catcher.control import Control
from deploy.local.catcher.journal import Journal
from deploy.local.catcher.session import CatcherSettings, SmtpSession

__all__ = ["main", "serve"]

LOOK = 0.1
BACKLOG = 512


async def serve(host: str, port: int, directory: Path, tls: ssl.SSLContext | None, *, implicit: bool) -> None:
    """Serve until SIGTERM or SIGINT, then keep and answer the mail that is complete. Raises OSError."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    settings = CatcherSettings(
        Journal(directory),
        Control(directory / "control.json"),
        user=os.environ.get("EMAIL_USER", ""),
        password=os.environ.get("EMAIL_PASS", ""),
        tls=None if implicit else tls,
    )

    async def listen() -> asyncio.Server:
        return await loop.create_server(
            lambda: SmtpSession(settings), host, port, backlog=BACKLOG, ssl=tls if implicit else None
        )

    server: asyncio.Server | None = await listen()
    assert server
    port = server.sockets[0].getsockname()[1]
    print(f"listening on {host}:{port}", flush=True)
    while not ended.is_set():
        try:
            await asyncio.wait_for(ended.wait(), LOOK)
        except TimeoutError:
            refuse = settings.control.refresh().connect == "refuse"
            if refuse and server:
                server.close()
                server = None
                for session in list(settings.open):
                    session.abort()
            elif not refuse and server is None:
                server = await listen()
    if server:
        server.close()
    settings.journal.close()
    # By now the last answers are callbacks of the loop.
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def main() -> None:
    """Run by the command line: where to listen, where to keep the mail, and with which TLS."""
    parser = argparse.ArgumentParser(
        prog="python3 -m deploy.local.catcher",
        description="An SMTP server that keeps what it is sent; with EMAIL_USER set it asks for AUTH.",
    )
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--mail-dir", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--tls", choices=("none", "starttls", "implicit"), default="none",
                        help="with a certificate of its own, DIRECTORY/tls/cert.pem")  # fmt: skip
    arguments = parser.parse_args()
    context = None
    if arguments.tls != "none":
        # This imports a large library.
        from deploy.local.catcher.certificate import server_context  # noqa: PLC0415

        context = server_context(arguments.mail_dir / "tls")
    host, _, port = arguments.listen.rpartition(":")
    gc.freeze()
    uvloop.run(serve(host, int(port), arguments.mail_dir, context, implicit=arguments.tls == "implicit"))


if __name__ == "__main__":
    main()
