"""The api's TLS over real connections, and the listeners that it accepts."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.api import access
from services.api.access import Access
from services.common.config import Settings
from tests.access_server import Code, Served, bearer, call, grant_line, serve, until, write_tokens
from tests.certificates import Certificates, make_certificates

REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files more often than an api does."""
    monkeypatch.setattr(access, "_INTERVAL", 0.1)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make(tmp_path / "server", "127.0.0.1")


def make(directory: Path, *names: str) -> Certificates:
    directory.mkdir()
    return make_certificates(directory, *names)


def tls(certificates: Certificates, **more: str) -> dict[str, str]:
    return {"tls_cert": str(certificates.certificate), "tls_key": str(certificates.key)} | more


def trusting(authority: Certificates, client: Certificates | None = None) -> grpc.ChannelCredentials:
    own = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    return grpc.ssl_channel_credentials(authority.authority.read_bytes(), *own)


async def test_only_tls_with_the_right_authority_is_served(
    tmp_path: Path, certificates: Certificates
) -> None:
    others = make(tmp_path / "others", "127.0.0.1")
    async with serve(**tls(certificates)) as served:
        async with grpc.aio.secure_channel(served.target, trusting(certificates)) as channel:
            assert await call(channel, "Count") == (Code.OK, "")
        async with grpc.aio.insecure_channel(served.target) as channel:
            assert (await call(channel, "Count"))[0] is Code.UNAVAILABLE
        async with grpc.aio.secure_channel(served.target, trusting(others)) as channel:
            assert (await call(channel, "Count"))[0] is Code.UNAVAILABLE
        assert len(served.calls) == 1


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_tls_is_1_2_or_later(certificates: Certificates) -> None:
    def version(most: ssl.TLSVersion) -> str | None:
        context = certificates.client()
        context.set_alpn_protocols(["h2"])
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = min(most, ssl.TLSVersion.TLSv1_2), most
        host, _, port = served.target.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=host) as secured:
                    return secured.version()
            except ssl.SSLError:
                return None

    async with serve(**tls(certificates)) as served:
        for most, spoken in (
            (ssl.TLSVersion.TLSv1_1, None),
            (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
            (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
        ):
            assert await asyncio.to_thread(version, most) == spoken


async def test_a_clients_certificate_is_demanded_and_names_its_tenant(
    tmp_path: Path, certificates: Certificates
) -> None:
    client = make(tmp_path / "client", "postroad://tenant/shop", "https://shop.test")
    nobody, foreign = (make(tmp_path / name, f"{name}://tenant/shop") for name in ("https", "foreign"))
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes(client.authority.read_bytes() + nobody.authority.read_bytes())
    tokens = write_tokens(tmp_path / "tokens", grant_line("ops", "ops"))
    settings = tls(certificates, tls_client_ca=str(authorities), tokens_file=tokens)
    async with serve(**settings) as served:

        async def answer(own: Certificates | None, metadata: Any = None) -> tuple[Code, str]:
            async with grpc.aio.secure_channel(served.target, trusting(certificates, own)) as channel:
                return await call(channel, "Count", metadata)

        assert await answer(client) == (Code.OK, "")
        assert served.calls[-1].tenant == "shop"
        # A token counts for more.
        assert await answer(client, bearer("ops")) == (Code.OK, "")
        assert served.calls[-1].tenant == "ops"
        assert await answer(nobody) == (Code.UNAUTHENTICATED, "TENANT_MISSING")
        assert await answer(nobody, bearer("ops")) == (Code.OK, "")
        for own in (None, foreign):
            assert (await answer(own, bearer("ops")))[0] is Code.UNAVAILABLE
        async with grpc.aio.secure_channel(served.target, trusting(certificates, client)) as channel:
            of_another_tenant = (("postroad-tenant", "ops"),)
            denied = (Code.PERMISSION_DENIED, "SCOPE_MISSING")
            assert await call(channel, "Retry", of_another_tenant) == denied


@pytest.mark.usefixtures("hurried")
async def test_certificates_are_swapped_under_load_and_no_call_fails(
    tmp_path: Path, certificates: Certificates
) -> None:
    old, new = certificates, make(tmp_path / "renewed", "127.0.0.1")
    both = grpc.ssl_channel_credentials(old.authority.read_bytes() + new.authority.read_bytes())
    stopping, results = asyncio.Event(), list[Code]()

    async def load() -> None:
        while not stopping.is_set():
            # Every call has a connection, and so a handshake, of its own.
            async with grpc.aio.secure_channel(served.target, both) as channel:
                results.append((await call(channel, "Count"))[0])

    async with (
        serve(**tls(old)) as served,
        grpc.aio.secure_channel(served.target, trusting(old)) as open_before,
    ):
        assert await call(open_before, "Count") == (Code.OK, "")
        clients = [asyncio.create_task(load()) for _ in range(4)]
        # A key without its certificate is a problem, and the old pair holds.
        shutil.copy(new.key, old.key)
        [problem] = await until(served.access.problems)
        assert "no certificate with its key" in problem
        assert await answers(served, old)
        shutil.copy(new.certificate, old.certificate)
        await until(lambda: answers(served, new))
        assert not served.access.problems()
        assert not await answers(served, old)
        assert await call(open_before, "Count") == (Code.OK, "")
        stopping.set()
        await asyncio.gather(*clients)
    assert len(results) > 20
    assert set(results) == {Code.OK}


async def answers(served: Served, authority: Certificates) -> bool:
    """Return whether a new client that trusts this authority is served."""
    async with grpc.aio.secure_channel(served.target, trusting(authority)) as channel:
        return (await call(channel, "Count"))[0] is Code.OK


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tls_key": None}, "POSTROAD_TLS_CERT: needs POSTROAD_TLS_KEY too"),
        ({"tls_cert": None}, "POSTROAD_TLS_KEY: needs POSTROAD_TLS_CERT too"),
        ({"tls_cert": ""}, "POSTROAD_TLS_CERT: is empty"),
        ({"tls_client_ca": ""}, "POSTROAD_TLS_CLIENT_CA: is empty"),
        ({"tls_client_ca": os.devnull}, "POSTROAD_TLS_CLIENT_CA has no certificates"),
        ({"tls_cert": "/nowhere"}, "/nowhere: No such file"),
        ({"tls_cert": os.devnull}, "no certificate with its key"),
        ({"tokens_file": ""}, "POSTROAD_TOKENS_FILE: is empty"),
        ({"tokens_file": "/nowhere"}, "POSTROAD_TOKENS_FILE: /nowhere: No such file"),
        ({"tokens_file": os.devnull}, "has no token"),
        ({"tokens_file": __file__}, "line 1: has"),
    ],
)
def test_files_that_do_not_serve_end_the_start(
    certificates: Certificates, changed: dict[str, str | None], says: str
) -> None:
    given = {name: value for name, value in (tls(certificates) | changed).items() if value is not None}
    with pytest.raises(ValueError, match=r"^POSTROAD_") as caught:
        Access(Settings(**given))  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_an_encrypted_key_asks_nobody_for_a_password(certificates: Certificates) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(certificates.key.read_bytes(), None)
    certificates.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"s3cret"),
        )
    )
    with pytest.raises(ValueError, match="no certificate with its key"):
        Access(Settings(**tls(certificates)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ((), "without TLS and tokens"),
        (("api_tokens",), "without TLS"),
        (("tokens_file",), "without TLS"),
        (("tls_cert", "tls_key"), "without tokens"),
        (("tls_cert", "tls_key", "tokens_file"), ""),
        (("tls_cert", "tls_key", "api_tokens"), ""),
        (("tls_cert", "tls_key", "tls_client_ca"), ""),
        (("insecure",), ""),
    ],
)
def test_a_wider_listener_needs_tls_and_tokens_or_certificates(
    tmp_path: Path, certificates: Certificates, given: tuple[str, ...], refusal: str
) -> None:
    every: dict[str, Any] = {
        "api_tokens": "shop:s3cret-one",
        "tokens_file": write_tokens(tmp_path / "tokens", grant_line("known")),
        **tls(certificates, tls_client_ca=str(certificates.authority)),
        "insecure": True,
    }
    settings = Settings(listen="0.0.0.0:0", **{name: every[name] for name in given})
    if not refusal:
        Access(settings)
        return
    with pytest.raises(ValueError, match=f"^POSTROAD_LISTEN: must be on loopback {refusal};"):
        Access(settings)


@pytest.mark.parametrize(
    ("listen", "setting", "reflects"),
    [
        ("127.0.0.1:0", "loopback", True),
        ("[::1]:0", "loopback", True),
        ("0.0.0.0:0", "loopback", False),
        ("0.0.0.0:0", "always", True),
        ("127.0.0.1:0", "never", False),
    ],
)
def test_reflection_is_for_loopback_unless_a_setting_says_otherwise(
    listen: str, setting: Any, reflects: bool
) -> None:
    assert Access(Settings(listen=listen, insecure=True, reflection=setting)).reflect is reflects


async def test_without_reflection_nobody_is_told_of_the_services() -> None:
    async with serve(reflection="never") as served, grpc.aio.insecure_channel(served.target) as channel:
        ask: Any = channel.stream_stream(REFLECTION)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in ask(iter([b""])):
                pass
        assert caught.value.code() is Code.UNIMPLEMENTED
