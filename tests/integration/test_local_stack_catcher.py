"""The catcher over real sockets: its journal, and each of its faults."""

import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local.catcher.control import Control
from deploy.local.catcher.faults import TABLE, Fault, fault_named, fault_of

MAIL = "Message-ID: <1@post.test>\r\nSubject: x\r\n\r\nHello\r\n"
TIMEOUT = 10.0


class Catcher:
    """One catcher process."""

    def __init__(self, directory: Path, *options: str, **env: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local.catcher", "--mail-dir", directory, *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "EMAIL_USER": "", **env},
        )
        assert self.process.stdout
        host, _, port = self.process.stdout.readline().split()[-1].rpartition(":")
        self.address = (host, int(port))

    def client(self) -> smtplib.SMTP:
        client = smtplib.SMTP(*self.address, timeout=TIMEOUT)
        client.ehlo()
        return client

    def send(self, rcpt: str, mail: str = MAIL) -> None:
        with self.client() as client:
            client.sendmail("a@post.test", [rcpt], mail)

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "journal.jsonl").read_text().splitlines()]

    def control(self, **orders: object) -> None:
        partial = self.directory / "control.tmp"
        partial.write_text(json.dumps(orders))
        partial.rename(self.directory / "control.json")

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(TIMEOUT) == 0
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Catcher]]:
    made: list[Catcher] = []

    def start(*options: str, **env: str) -> Catcher:
        made.append(Catcher(tmp_path / f"mail{len(made)}", *options, **env))
        return made[-1]

    yield start
    for catcher in made:
        if catcher.process.poll() is None:
            catcher.end()


@pytest.fixture
def catcher(make: Callable[..., Catcher]) -> Catcher:
    return make()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.01)


def _is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def _talk(catcher: Catcher, text: bytes) -> bytes:
    """Send `text`, and return all that the catcher replies until the connection ends."""
    with socket.create_connection(catcher.address, timeout=TIMEOUT) as connection:
        connection.sendall(text)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_an_accepted_mail_is_in_the_journal_and_in_a_file(catcher: Catcher) -> None:
    before = time.time()
    catcher.send("ann@good.test")
    (entry,) = catcher.journal()
    assert before <= entry.pop("at") <= time.time()
    path = Path(entry.pop("path"))
    assert entry == {
        "message_id": "<1@post.test>", "rcpt": "ann@good.test", "mail_from": "a@post.test", "size": len(MAIL)
    }  # fmt: skip
    assert path.parent == catcher.directory
    assert path.suffix == ".eml"
    assert path.read_bytes() == MAIL.encode()


def test_the_journal_is_complete_after_sigkill(catcher: Catcher) -> None:
    for number in range(20):
        catcher.send(f"u{number}@good.test")
    catcher.process.kill()
    catcher.process.wait()
    assert [entry["rcpt"] for entry in catcher.journal()] == [f"u{number}@good.test" for number in range(20)]
    assert catcher.process.stdout
    catcher.process.stdout.close()


def test_dots_are_unstuffed_and_bare_line_feeds_end_no_message(catcher: Catcher) -> None:
    message = b".one\r\n..two\r\n\n.\n\r\n.\rx\r\nlast\r\n"
    stuffed = b"..one\r\n...two\r\n\n.\n\r\n..\rx\r\nlast\r\n"
    answer = _talk(
        catcher, b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@c.test>\r\nDATA\r\n" + stuffed + b".\r\nQUIT\r\n"
    )
    assert answer.endswith(b"354 Go on\r\n250 2.0.0 Kept\r\n221 2.0.0 Bye\r\n")
    (entry,) = catcher.journal()
    assert Path(entry["path"]).read_bytes() == message


def test_the_end_of_a_message_is_found_in_pieces(catcher: Catcher) -> None:
    with socket.create_connection(catcher.address, timeout=TIMEOUT) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        replies = connection.makefile("rb")
        for text in (b"", b"HELO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"):
            connection.sendall(text)
            replies.readline()
        for byte in MAIL.encode() + b".\r\n":
            connection.sendall(bytes([byte]))
        assert replies.readline().startswith(b"250")
        replies.close()
    assert catcher.journal()[0]["size"] == len(MAIL)


def test_a_mail_over_the_limit_is_refused_and_the_session_goes_on(catcher: Catcher) -> None:
    with catcher.client() as client:
        assert client.docmd("MAIL", "FROM:<a@b.test> SIZE=99999999")[0] == 552
    # Without EHLO a client cannot announce the size.
    with smtplib.SMTP(*catcher.address, timeout=TIMEOUT) as client:
        client.helo()
        with pytest.raises(smtplib.SMTPDataError) as refused:
            client.sendmail("a@b.test", ["c@d.test"], ("y" * 78 + "\r\n") * 140_000)
        assert refused.value.smtp_code == 552
        client.sendmail("a@b.test", ["c@d.test"], MAIL)
    assert len(catcher.journal()) == 1


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("reject4", 450, smtplib.SMTPRecipientsRefused),
        ("reject5", 550, smtplib.SMTPRecipientsRefused),
        ("shut421", 421, smtplib.SMTPRecipientsRefused),
        ("data4", 451, smtplib.SMTPDataError),
        ("data5", 554, smtplib.SMTPDataError),
    ],
)
def test_refusals(catcher: Catcher, name: str, code: int, error: type[smtplib.SMTPException]) -> None:
    for rcpt in (f"{name}@good.test", f"{name}+more@other.test", f"{name.upper()}@good.test"):
        with pytest.raises(error) as refused:
            catcher.send(rcpt)
        found = (
            refused.value.recipients[rcpt][0]
            if isinstance(refused.value, smtplib.SMTPRecipientsRefused)
            else refused.value.smtp_code
        )
        assert found == code
    assert catcher.journal() == []


def test_shut421_closes(catcher: Catcher) -> None:
    answer = _talk(catcher, b"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<shut421@b>\r\nDATA\r\n")
    assert answer.endswith(b"421 4.3.2 <shut421@b>: Shutting down\r\n")


def test_greylisting_ends_after_its_tries_for_each_recipient(catcher: Catcher) -> None:
    for rcpt, tries in (("greylist@a.test", 1), ("greylist@b.test", 1), ("greylist-3@a.test", 3)):
        for _ in range(tries):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                catcher.send(rcpt)
        catcher.send(rcpt)
    assert len(catcher.journal()) == 3


def test_drop_before_closes_before_354(catcher: Catcher) -> None:
    talk = b"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<drop-before@b>\r\nDATA\r\n"
    assert _talk(catcher, talk).endswith(b"250 2.1.5 OK\r\n")
    catcher.send("drop-before@b")
    assert len(catcher.journal()) == 1


@pytest.mark.parametrize(("name", "taken"), [("drop-after", 1), ("drop-lost", 0)])
def test_drops_after_the_dot_close_without_a_reply(catcher: Catcher, name: str, taken: int) -> None:
    talk = f"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<{name}@b>\r\nDATA\r\n{MAIL}.\r\n".encode()
    assert _talk(catcher, talk).endswith(b"354 Go on\r\n")
    assert len(catcher.journal()) == taken
    catcher.send(f"{name}@b")
    assert len(catcher.journal()) == taken + 1


def test_hang_takes_nothing_and_does_not_reply(catcher: Catcher) -> None:
    with catcher.client() as client:
        assert client.sock
        client.sock.settimeout(0.5)
        with pytest.raises(smtplib.SMTPServerDisconnected, match="timed out"):
            client.sendmail("a@b.test", ["hang@b.test"], MAIL)
        client.close()
    assert catcher.journal() == []


def test_slow_replies_late_and_takes_the_mail(catcher: Catcher) -> None:
    began = time.monotonic()
    catcher.send("slow-300@b.test")
    assert 0.3 <= time.monotonic() - began < 2
    assert len(catcher.journal()) == 1


def test_the_control_file_closes_and_opens_the_port(catcher: Catcher) -> None:
    with socket.create_connection(catcher.address, timeout=TIMEOUT) as open_before:
        assert open_before.recv(100).startswith(b"220")
        catcher.control(connect="refuse")

        def refused() -> bool:
            try:
                socket.create_connection(catcher.address, timeout=1).close()
            except ConnectionRefusedError:
                return True
            return False

        _until(refused)
        assert _is_cut(open_before)
    catcher.control(connect="ok")
    _until(lambda: not refused())
    catcher.send("ann@good.test")


def test_the_control_file_rules(catcher: Catcher) -> None:
    catcher.control(rules=[{"rcpt": "*@slow.test", "fault": "reject5"}], mail="")
    catcher.send("ann@good.test")
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        catcher.send("Ann@Slow.test")
    catcher.control(mail="451 4.3.2 Busy")
    with pytest.raises(smtplib.SMTPSenderRefused) as busy:
        catcher.send("ann@good.test")
    assert busy.value.smtp_code == 451
    catcher.control(connect="421")
    with pytest.raises(smtplib.SMTPConnectError):
        catcher.send("ann@good.test")
    catcher.control(connect="hang")
    with socket.create_connection(catcher.address, timeout=0.3) as silent, pytest.raises(TimeoutError):
        silent.recv(100)
    (catcher.directory / "control.json").unlink()
    catcher.send("ann@good.test")


def test_a_rule_applies_with_its_probability(tmp_path: Path) -> None:
    file = tmp_path / "control.json"
    file.write_text(json.dumps({"seed": 7, "rules": [{"fault": "data4", "probability": 0.25}]}))
    control = Control(file)
    control.refresh()
    struck = sum(control.fault("ann@good.test") == Fault("data4") for _ in range(2000))
    assert 400 < struck < 600


def test_a_wrong_control_file_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "control.json"
    file.write_text('{"connect": "421"}')
    control = Control(file)
    control.refresh()
    wrong = ('{"connect"', '{"connect": "sideways"}', '{"rules": [{"fault": "nope"}]}')
    for number, text in enumerate(wrong, 1):
        file.write_text(text)
        os.utime(file, (number, number))
        assert control.refresh().connect == "421"
    assert capsys.readouterr().out.count("control.json") == 3


def test_authentication_is_required_and_checked(make: Callable[..., Catcher]) -> None:
    catcher = make(EMAIL_USER="post", EMAIL_PASS="secret")
    with catcher.client() as client:
        assert client.docmd("MAIL", "FROM:<a@b.test>")[0] == 530
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("post", "wrong")
    for mechanism in ("plain", "login"):
        with catcher.client() as client:
            client.user, client.password = "post", "secret"
            code, _ = client.auth(
                mechanism, getattr(client, f"auth_{mechanism}"), initial_response_ok=mechanism == "plain"
            )
            assert code == 235
            client.sendmail("a@b.test", ["c@d.test"], MAIL)
    catcher.control(auth="fail")
    with catcher.client() as client, pytest.raises(smtplib.SMTPAuthenticationError):
        client.login("post", "secret")
    assert len(catcher.journal()) == 2


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_tls_with_a_certificate_of_its_own(make: Callable[..., Catcher], tls: str) -> None:
    catcher = make("--tls", tls)
    trust = ssl.create_default_context(cafile=str(catcher.directory / "tls" / "cert.pem"))
    host, port = catcher.address
    if tls == "implicit":
        client: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=TIMEOUT, context=trust)
    else:
        client = smtplib.SMTP(host, port, timeout=TIMEOUT)
        client.starttls(context=trust)
    with client:
        client.sendmail("a@b.test", ["c@d.test"], MAIL)
    assert len(catcher.journal()) == 1


def test_commands_before_the_handshake_do_not_count_after_it(make: Callable[..., Catcher]) -> None:
    catcher = make("--tls", "starttls")
    trust = ssl.create_default_context(cafile=str(catcher.directory / "tls" / "cert.pem"))
    with socket.create_connection(catcher.address, timeout=TIMEOUT) as plain:
        plain.recv(100)
        plain.sendall(b"STARTTLS\r\nMAIL FROM:<smuggled@b.test>\r\n")
        assert plain.recv(100) == b"220 2.0.0 Go on\r\n"
        with trust.wrap_socket(plain, server_hostname="localhost") as secure:
            secure.sendall(b"RCPT TO:<c@d.test>\r\n")
            assert secure.recv(100).startswith(b"503")


def test_complete_messages_get_their_reply_after_sigterm(catcher: Catcher) -> None:
    with socket.create_connection(catcher.address, timeout=TIMEOUT) as connection:
        replies = connection.makefile("rb")
        replies.readline()
        connection.sendall(f"HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n{MAIL}.\r\n".encode())
        for _ in range(4):
            replies.readline()
        catcher.process.send_signal(signal.SIGTERM)
        assert replies.readline().startswith(b"250")
        replies.close()
    assert catcher.process.wait(TIMEOUT) == 0
    assert len(catcher.journal()) == 1


@pytest.mark.parametrize("name", TABLE)
def test_every_fault_has_a_name_with_and_without_a_count(name: str) -> None:
    if name == "slow":
        assert fault_named("slow") is None
        assert fault_of("slow-20+x@y") == Fault("slow", milliseconds=20)
        return
    assert fault_of(f"{name}@y") == Fault(name, TABLE[name][0])
    assert fault_of(f"{name}-4+tag@y") == Fault(name, 4)
    assert fault_named(f"{name}-always") == Fault(name)
    assert fault_of(f"not{name}@y") is None
