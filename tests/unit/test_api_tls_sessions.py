"""TLS sessions that a client resumes: its certificate is checked each time that a connection opens."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from tests.access_server import Served, serve
from tests.certificates import Certificates, make_certificates

# The preface of HTTP/2 and an empty SETTINGS frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("certificate", [True, False])
async def test_a_client_with_a_certificate_resumes_no_session(
    tmp_path: Path, version: ssl.TLSVersion, certificate: bool
) -> None:
    server, client = (_make(tmp_path / name, of) for name, of in _NAMES.items())
    settings = {"tls_cert": str(server.certificate), "tls_key": str(server.key)}
    if certificate:
        settings["tls_client_ca"] = str(client.authority)
    context = server.client()
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(client.certificate, client.key)
    async with serve(**settings) as served:
        resumed, session = await asyncio.to_thread(_connect, served, context, None)
        assert not resumed
        assert session is not None
        # A resumed session has the certificate of the first one, which may have ended meanwhile.
        resumed, _ = await asyncio.to_thread(_connect, served, context, session)
        assert resumed is not certificate


_NAMES = {"server": "127.0.0.1", "client": "postroad://tenant/shop"}


def _make(directory: Path, name: str) -> Certificates:
    directory.mkdir()
    return make_certificates(directory, name)


def _connect(
    served: Served, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[bool, ssl.SSLSession | None]:
    """Open a connection that the api answers; return whether it resumed this session, and its own one."""
    host, _, port = served.target.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host, session=session) as secured,
    ):
        secured.sendall(_PREFACE)
        assert secured.recv(9)
        return bool(secured.session_reused), secured.session
