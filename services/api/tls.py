"""The api's TLS: its certificate, read again without a restart, and the authority of its clients."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from services.api.reloaded_files import ReloadedFiles

__all__ = ["TlsFiles", "check_paths", "server_credentials", "tls_files"]


class Pems(NamedTuple):
    """What the api's files have: a certificate, its key, and the authorities of clients, if they need any."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return a new configuration. gRPC can use each one once."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.client_ca)


TlsFiles = ReloadedFiles[Pems]


def check_paths(certificate: str | None, key: str | None, client_ca: str | None) -> bool:
    """Return whether these settings ask for TLS. None is a setting that is not given.

    Raises ValueError for one without the others that it needs, and for an empty one, which would silently
    open the api.
    """
    given = {"POSTROAD_TLS_CERT": certificate, "POSTROAD_TLS_KEY": key, "POSTROAD_TLS_CLIENT_CA": client_ca}
    for name, path in given.items():
        if path is None:
            continue
        if not path:
            raise ValueError(f"{name}: is empty; it must name a file, or be unset")
        for needed in ("POSTROAD_TLS_CERT", "POSTROAD_TLS_KEY"):
            if given[needed] is None:
                raise ValueError(f"{name}: needs {needed} too")
    return certificate is not None


def tls_files(certificate: str, key: str, client_ca: str | None) -> TlsFiles:
    """Return the files of the api's TLS (PEM). Raises ValueError for files that do not fit together. Blocks.

    With `client_ca` every client must have a certificate that one of these authorities signed.
    """

    def load() -> Pems:
        chain, secret = Path(certificate).read_bytes(), Path(key).read_bytes()
        roots = Path(client_ca).read_bytes() if client_ca else None
        _check(certificate, key, roots)
        if (chain, secret) != (Path(certificate).read_bytes(), Path(key).read_bytes()):
            raise ValueError(f"{certificate}: changes while it is read")
        return Pems(chain, secret, roots)

    return ReloadedFiles([certificate, key, *([client_ca] if client_ca else [])], load)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return the credentials of a server that takes the present files at each handshake.

    gRPC accepts TLS 1.2 and 1.3 alone.
    """
    latest = files.value
    client_certificates = latest.client_ca is not None

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # On a thread of gRPC's. None leaves the certificate as it is, which saves parsing it each time.
        nonlocal latest
        present = files.value
        # A client that resumes a TLS session has its certificate checked no more, even after its end. Each
        # configuration has keys of its own for sessions, so a new one lets nobody resume an earlier session.
        if present is latest and not client_certificates:
            return None
        latest = present
        return present.configuration()

    # types-grpcio does not know that it may return None.
    initial = latest.configuration()
    return grpc.dynamic_ssl_server_credentials(initial, fetch, client_certificates)  # type: ignore[arg-type]


def _check(certificate: str, key: str, roots: bytes | None) -> None:
    """Raise ValueError unless the key is the certificate's, and `roots` has certificates in PEM. Blocks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password, OpenSSL would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        reason = (error.reason or "no PEM").replace("_", " ").lower()
        raise ValueError(f"{certificate} and {key} are no certificate with its key: {reason}") from None
    if roots is None:
        return
    try:
        context.load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ValueError("POSTROAD_TLS_CLIENT_CA has no certificates in PEM") from None
