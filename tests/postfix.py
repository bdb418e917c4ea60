"""A private Postfix: its own configuration, queue and ports, real smtpd, real delivery into a maildir.

Needs root (Postfix drops its own rights) and Debian's ``postfix``, ``libsasl2-modules`` and ``sasl2-bin``.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import Message
from pathlib import Path

from tests.certificates import Certificates, make_certificates
from tests.reaper import RUN

__all__ = ["PASSWORD", "USER", "Postfix", "missing", "postfix"]

USER, PASSWORD = "postroad", "correct horse"
_REALM = "mail.postroad.test"
_START_SECONDS = 20.0


@dataclass(frozen=True)
class Postfix:
    """A running instance. Mail to anyone at ``local.test`` lands in one maildir."""

    directory: Path
    certificates: Certificates
    mx_port: int
    """Clear or STARTTLS, no AUTH wanted."""
    submission_port: int
    """STARTTLS and AUTH, both required."""
    submissions_port: int
    """The same with implicit TLS."""
    narrow_port: int
    """Takes two sessions of one client at most, and ends idle ones after a second."""

    def log(self) -> str:
        path = self.directory / "postfix.log"
        return path.read_text() if path.exists() else ""

    def delivered(self) -> dict[str, list[Message]]:
        """The messages that have been delivered so far, by Message-ID."""
        found: dict[str, list[Message]] = {}
        # Postfix makes the maildir with the first delivery.
        for path in (self.directory / "mail" / "all" / "new").glob("*"):
            message = message_from_bytes(path.read_bytes(), policy=policy.default)
            found.setdefault(message["message-id"], []).append(message)
        return found

    def wait_for(self, *message_ids: str, seconds: float = 20.0) -> dict[str, list[Message]]:
        """Wait until all these are delivered; return everything that is."""
        deadline = time.monotonic() + seconds
        while not set(message_ids) <= (found := self.delivered()).keys():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not delivered: {set(message_ids) - found.keys()}\n{self.log()[-4000:]}")
            time.sleep(0.1)
        return found


def missing() -> str | None:
    """Why no Postfix can be run here, or None."""
    if os.geteuid() != 0:
        return "running a private Postfix takes root"
    for program in ("/usr/sbin/postfix", "/usr/sbin/saslpasswd2"):
        if not Path(program).exists():
            return f"no {program}: apt-get install postfix libsasl2-modules sasl2-bin"
    return None


@contextmanager
def postfix(policy_port: int) -> Iterator[Postfix]:
    """Run an instance until the end of the block. ``policy_port``: of the access policy server to ask."""
    # Not under pytest's own directory, which only root can enter.
    directory = Path(tempfile.mkdtemp(prefix="postroad-postfix-"))
    directory.chmod(0o755)
    ports = _free_ports(4)
    instance = Postfix(directory, make_certificates(directory, "localhost", "127.0.0.1", _REALM), *ports)
    _write(instance, policy_port)
    process = subprocess.Popen(
        ["/usr/sbin/postfix", "-c", str(directory / "etc"), "start-fg"],
        stdout=(directory / "output").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_for_ports(process, ports, instance)
        yield instance
    finally:
        # `start-fg` is a wrapper around the master process, and ends with it.
        pid_file = directory / "queue" / "pid" / "master.pid"
        if pid_file.exists():
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for_ports(process: "subprocess.Popen[bytes]", ports: list[int], instance: Postfix) -> None:
    deadline = time.monotonic() + _START_SECONDS
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    output = (instance.directory / "output").read_text()
                    raise RuntimeError(f"Postfix did not start: {output}\n{instance.log()}") from error
                time.sleep(0.05)


def _write(instance: Postfix, policy_port: int) -> None:
    directory = instance.directory
    owner = pwd.getpwnam("postfix")
    for name in ("etc", "etc/sasl", "queue", "data", "mail"):
        (directory / name).mkdir()
    for name in ("data", "mail"):
        os.chown(directory / name, owner.pw_uid, owner.pw_gid)
    # Debian's Postfix looks for this below its own configuration, whatever cyrus_sasl_config_path is.
    (directory / "etc" / "sasl" / "smtpd.conf").write_text(
        "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN\n"
        f"sasldb_path: {directory}/etc/sasl/sasldb2\n"
    )
    subprocess.run(
        [
            "/usr/sbin/saslpasswd2",
            "-p",
            "-c",
            "-f",
            directory / "etc" / "sasl" / "sasldb2",
            "-u",
            _REALM,
            USER,
        ],
        input=PASSWORD.encode(),
        check=True,
    )
    os.chown(directory / "etc" / "sasl" / "sasldb2", owner.pw_uid, owner.pw_gid)
    (directory / "etc" / "header_checks").write_text("/^Subject: .*unwanted/ REJECT 5.7.1 this is unwanted\n")
    (directory / "etc" / "body_checks").write_text("/^unwanted body/ REJECT 5.6.0 this body is unwanted\n")
    (directory / "etc" / "main.cf").write_text(
        _MAIN.format(
            directory=directory,
            realm=_REALM,
            uid=owner.pw_uid,
            gid=owner.pw_gid,
            policy=policy_port,
            mark=RUN,
        )
    )
    (directory / "etc" / "master.cf").write_text(
        _MASTER.format(
            mx=instance.mx_port,
            submission=instance.submission_port,
            submissions=instance.submissions_port,
            narrow=instance.narrow_port,
        )
    )


_MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
maillog_file = {directory}/postfix.log
maillog_file_prefixes = {directory}
import_environment = MAIL_CONFIG MAIL_LOGTAG TZ LANG=C {mark}
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = {realm}
mydestination =
mynetworks = 192.0.2.1
alias_maps =
alias_database =
local_recipient_maps =
default_transport = error:nothing leaves this machine
virtual_mailbox_domains = local.test
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = static:all/
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
message_size_limit = 200000
smtpd_client_event_limit_exceptions =
smtpd_error_sleep_time = 0
smtpd_hard_error_limit = 100
smtpd_tls_cert_file = {directory}/server.pem
smtpd_tls_key_file = {directory}/server.key
smtpd_tls_security_level = may
smtpd_sasl_path = smtpd
smtpd_sasl_local_domain = {realm}
smtpd_relay_restrictions = reject_unauth_destination
smtpd_sender_restrictions = check_sender_access inline:{{
    {{ banned@example.org = 550 5.7.1 sender not wanted here }} }}
smtpd_recipient_restrictions = check_recipient_access inline:{{
    {{ gone@local.test = 550 5.1.1 no such user }},
    {{ full@local.test = 452 4.2.2 mailbox full }},
    {{ closing@local.test = 421 4.3.2 closing down }} }},
    check_policy_service inet:127.0.0.1:{policy}
smtpd_end_of_data_restrictions = check_recipient_access inline:{{
    {{ later@local.test = 451 4.7.1 not now, try again in 5 minutes }},
    {{ closingafter@local.test = 421 4.3.2 closing down }} }}
header_checks = regexp:{directory}/etc/header_checks
body_checks = regexp:{directory}/etc/body_checks
"""

_MASTER = """\
127.0.0.1:{mx} inet n - n - - smtpd
127.0.0.1:{submission} inet n - n - - smtpd
    -o smtpd_tls_security_level=encrypt
    -o smtpd_sasl_auth_enable=yes
    -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
127.0.0.1:{submissions} inet n - n - - smtpd
    -o smtpd_tls_wrappermode=yes
    -o smtpd_sasl_auth_enable=yes
    -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
127.0.0.1:{narrow} inet n - n - - smtpd
    -o smtpd_client_connection_count_limit=2
    -o smtpd_timeout=1
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
