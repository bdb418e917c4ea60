"""OAuth tokens: fetched by client credentials, cached, renewed ahead of time; trouble is shown."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, quote_plus

import pytest

from services.sender.oauth import OAuthTokens, TokenError

SECRET = "s3cret+of/the client"


class TokenServer:
    """Answers each request with the status and the body of `answer`."""

    def __init__(self) -> None:
        self.forms: list[dict[str, list[str]]] = []
        self.answer: Callable[[int], tuple[str, str]] = lambda n: ("200 OK", token(f"token-{n}"))
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        [length] = [
            line.split()[1] for line in head.split("\r\n") if line.lower().startswith("content-length")
        ]
        assert head.startswith("POST /token ")
        assert "application/x-www-form-urlencoded" in head
        self.forms.append(parse_qs((await reader.readexactly(int(length))).decode()))
        status, body = self.answer(len(self.forms))
        extra = "Location: /elsewhere\r\n" if status.startswith("3") else ""
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n{body}".encode())
        await writer.drain()
        writer.close()


def token(value: str, **more: object) -> str:
    return json.dumps({"access_token": value, "token_type": "Bearer", "expires_in": 1000} | more)


@asynccontextmanager
async def token_server() -> AsyncIterator[TokenServer]:
    server = TokenServer()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/token"
    try:
        yield server
    finally:
        listener.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tokens_from(server: TokenServer, clock: Clock, scope: str = "mail.send") -> OAuthTokens:
    return OAuthTokens(server.url, "client-1", lambda: SECRET, scope, timeout=5, clock=clock)


async def test_a_token_is_fetched_by_client_credentials_and_kept_while_it_holds() -> None:
    clock = Clock()
    async with token_server() as server:
        tokens = tokens_from(server, clock)
        assert await asyncio.gather(*(tokens.get() for _ in range(20))) == ["token-1"] * 20
        assert server.forms == [
            {
                "grant_type": ["client_credentials"],
                "client_id": ["client-1"],
                "client_secret": [SECRET],
                "scope": ["mail.send"],
            }
        ]
        clock.now = 999
        assert await tokens.get() == "token-1"
        clock.now = 1000
        assert await tokens.get() == "token-2"


async def test_only_the_refused_token_is_forgotten() -> None:
    async with token_server() as server:
        tokens = tokens_from(server, Clock())
        assert await tokens.get() == "token-1"
        tokens.forget("another")
        assert await tokens.get() == "token-1"
        tokens.forget("token-1")
        assert await tokens.get() == "token-2"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_the_token_is_renewed_ahead_of_time_and_failures_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.sender.oauth._RETRY_SECONDS", 0.01)
    clock = Clock()
    async with token_server() as server:
        tokens = tokens_from(server, clock)
        running = asyncio.create_task(tokens.run())
        await until(lambda: len(server.forms) == 1)
        assert await tokens.get() == "token-1"
        server.answer = lambda n: ("503 Service Unavailable", "busy")
        # `run` sleeps by another clock until the token needs a renewal.
        running.cancel()
        clock.now = 801
        running = asyncio.create_task(tokens.run())
        await until(lambda: tokens.trouble is not None)
        assert tokens.trouble == "503 busy"
        assert await tokens.get() == "token-1"
        server.answer = lambda n: ("200 OK", token("token-new"))
        await until(lambda: tokens.trouble is None)
        assert await tokens.get() == "token-new"
        running.cancel()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            (
                "401 Unauthorized",
                json.dumps({"error": "invalid_client", "error_description": "bad\r\nsecret"}),
            ),
            "401 invalid_client bad  secret",
        ),
        (("400 Bad Request", json.dumps({"error": f"not {SECRET}"})), r"400 not \*\*\*"),
        (("500 Oops", "<html>"), "500 <html>"),
        (("302 Found", ""), "302"),
        (("200 OK", "no json"), "not JSON"),
        (("200 OK", "[]"), "not a JSON object"),
        (("200 OK", "{}"), "no access_token"),
        (("200 OK", token("t", expires_in="soon")), "soon"),
        (("200 OK", token("t", expires_in=float("nan"))), "expires_in"),
        (("200 OK", token("t", expires_in=float("inf"))), "expires_in"),
        (("200 OK", token("t", expires_in=-1)), "expires_in"),
        (("200 OK", token("t", expires_in=10**400)), "too large"),
        (("200 OK", "[" * 200_000), "recursion"),
        (("400 Bad Request", "[" * 200_000), "recursion"),
        (("200 OK", token("t", expires_in=SECRET)), "float"),
    ],
)
async def test_the_reason_for_no_token_is_shown_without_the_secret(
    answer: tuple[str, str], says: str
) -> None:
    async with token_server() as server:
        server.answer = lambda n: answer
        clock = Clock()
        tokens = tokens_from(server, clock)
        with pytest.raises(TokenError, match=says) as caught:
            await tokens.get()
        assert tokens.trouble == str(caught.value)
        assert SECRET not in str(caught.value)
        # Callers of the same moment share one fetch.
        with pytest.raises(TokenError):
            await tokens.get()
        assert len(server.forms) == 1
        server.answer = lambda n: ("200 OK", token("good"))
        clock.now += 2
        assert await tokens.get() == "good"
        assert tokens.trouble is None


@pytest.mark.parametrize(
    "body",
    [
        f"bad request: client_secret={quote_plus(SECRET)}&scope=",
        *(f"{'x' * before} {SECRET}" for before in range(270, 305, 5)),
        json.dumps({"error": f"{'x' * 285} {SECRET}"}),
    ],
)
@pytest.mark.parametrize("status", ["400 Bad Request", "400 client_secret={}"])
async def test_a_server_that_repeats_the_form_has_no_part_of_the_secret_shown(
    body: str, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with token_server() as server:
        server.answer = lambda n: (status.format(SECRET), body)
        tokens = tokens_from(server, Clock())
        with pytest.raises(TokenError):
            await tokens.get()
    shown = capsys.readouterr()
    assert "s3cr" not in f"{tokens.trouble} {shown.out} {shown.err}"


async def test_a_reply_that_is_no_http_has_no_secret_shown() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        form = (await reader.readuntil(b"\r\n\r\n") + await reader.read(4096)).rpartition(b"\r\n")[2]
        writer.write(b"what is " + form + b"\r\n")
        writer.close()

    listener = await asyncio.start_server(echo, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
    with pytest.raises(TokenError, match=r"client_secret=\*\*\*") as caught:
        await OAuthTokens(url, "client-1", lambda: SECRET).get()
    assert "s3cr" not in str(caught.value)
    listener.close()


@pytest.mark.parametrize(
    "answer", ["[" * 200_000, token("t", expires_in=float("nan"))], ids=["nested", "nan"]
)
async def test_no_answer_ends_the_renewing(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sender.oauth._RETRY_SECONDS", 0.01)
    async with token_server() as server:
        server.answer = lambda n: ("200 OK", answer if n < 3 else token("good"))
        tokens = tokens_from(server, Clock())
        running = asyncio.create_task(tokens.run())
        await until(lambda: len(server.forms) == 3 and tokens.trouble is None)
        assert not running.done()
        running.cancel()


@pytest.mark.parametrize(
    "begins", ["", "HTTP/1.1 200 OK\r\nX: ", "HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
async def test_a_fetch_from_a_slow_server_ends_in_time(begins: str) -> None:
    left = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(begins.encode())
        try:
            while True:
                writer.write(b"y")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            left.set()

    listener = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
    tokens = OAuthTokens(url, "client-1", lambda: SECRET, timeout=0.3)
    async with asyncio.timeout(10):
        with pytest.raises(TokenError, match=r"no answer within 0\.3 s"):
            await tokens.get()
        assert tokens.trouble == "no answer within 0.3 s"
        # The thread that reads from it ends too.
        await left.wait()
    listener.close()


def test_a_process_ends_though_the_token_server_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"

        async def main() -> None:
            asking = asyncio.create_task(OAuthTokens(url, "client-1", lambda: SECRET, timeout=60).get())
            silent.settimeout(20)
            connection, _ = await asyncio.to_thread(silent.accept)
            asking.cancel()
            await asyncio.wait([asking])
            connections.append(connection)

        connections: list[socket.socket] = []
        started = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - started < 30
        connections[0].close()


async def test_a_server_that_is_away_is_trouble() -> None:
    async with token_server() as server:
        pass
    with pytest.raises(TokenError, match="refused"):
        await tokens_from(server, Clock()).get()


async def test_without_a_scope_none_is_asked_for() -> None:
    async with token_server() as server:
        await tokens_from(server, Clock(), scope="").get()
        assert "scope" not in server.forms[0]
