"""Who a call is: its bearer token, its certificate, and what follows many calls without either."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.api import failed_attempts
from services.api.auth import ANYONE, TENANT_SCOPES, Authenticator, grants_of_pairs
from services.api.call import Metadata
from services.api.errors import StatusError
from services.api.failed_attempts import BURST, FailedAttempts, peer_address
from services.common.grants import Grant, token_digest

TOKEN = "postroad_" + "a" * 43
Code = grpc.StatusCode


def context(peer: str = "ipv4:192.0.2.1:40000", **properties: list[bytes]) -> Any:
    return SimpleNamespace(peer=lambda: peer, auth_context=lambda: properties)


def bearer(*tokens: str) -> Metadata:
    return Metadata([("authorization", f"Bearer {token}") for token in tokens])


def grant(token: str = TOKEN, **changes: Any) -> Grant:
    return Grant("laptop", "shop", token_digest(token), frozenset({"read"}))._replace(**changes)


def of_file(*grants: Grant) -> Authenticator:
    found = Authenticator(file=True)
    found.replace(grants)
    return found


def refusal(authenticator: Authenticator, metadata: Metadata, where: Any = None) -> tuple[Code, str]:
    with pytest.raises(StatusError) as caught:
        authenticator.authenticate(metadata, where or context())
    return caught.value.code, caught.value.reason


def test_two_bearer_tokens_are_refused() -> None:
    authenticator = Authenticator(grants_of_pairs("shop:s3cret-one,bank:s3cret-two"))
    assert refusal(authenticator, bearer("s3cret-one", "s3cret-two")) == (
        Code.UNAUTHENTICATED,
        "TOKEN_UNKNOWN",
    )


def test_without_tokens_everyone_is_the_default_tenant() -> None:
    assert Authenticator().authenticate(bearer("whatever"), context()) is ANYONE
    assert ANYONE.tenant == "default"
    assert not ANYONE.reaches_all_tenants


def test_a_token_identifies_its_tenant() -> None:
    pairs = grants_of_pairs("shop:s3cret-one, shop:s3cret-two,bank:x:y:z:12345")
    authenticator = Authenticator(pairs)

    def tenant(header: str) -> str:
        return authenticator.authenticate(Metadata([("authorization", header)]), context()).tenant

    for _ in range(2):  # the second time by the header
        assert tenant("Bearer s3cret-one") == "shop"
        assert tenant("bearer  s3cret-two") == "shop"
        assert tenant("Bearer x:y:z:12345") == "bank"
    for bad in ("", "Bearer", "Bearer ", "Bearer s3cret-onE", "Basic s3cret-one", "s3cret-one"):
        assert refusal(authenticator, Metadata([("authorization", bad)])) == (
            Code.UNAUTHENTICATED,
            "TOKEN_UNKNOWN",
        )
    assert refusal(authenticator, Metadata(())) == (Code.UNAUTHENTICATED, "TOKEN_MISSING")


def test_a_token_of_the_setting_operates_nothing() -> None:
    [found] = grants_of_pairs("shop:s3cret-one")
    assert found.scopes == {"create", "read", "cancel", "content"} == TENANT_SCOPES


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("", "has no pair"),
        (" ", "has no pair"),
        ("shop", "TENANT:TOKEN"),
        (",", "TENANT:TOKEN"),
        ("shop:", "token of pair 1"),
        (":s3cret-one", "tenant of pair 1"),
        ("sh op:s3cret-one", "tenant of pair 1"),
        ("-shop:s3cret-one", "tenant of pair 1"),
        ("a:s3cret-one,b:s3cret-one", "the token of pair 2 belongs to another tenant too"),
        ("shop:s3cret-one,bank:short", "token of pair 2 is not 8 or more visible ASCII characters"),
        ("shop:s3crét-one", "visible ASCII"),
        ("shop:s3cret\t-one", "visible ASCII"),
    ],
)
def test_an_invalid_token_setting_is_refused_without_showing_a_token(tokens: str, says: str) -> None:
    with pytest.raises(ValueError, match="pair") as caught:
        grants_of_pairs(tokens)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_token_of_the_file_holds_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    authenticator = of_file(grant(not_after=time.time() + 60))
    found = authenticator.authenticate(bearer(TOKEN), context())
    assert (found.id, authenticator.is_current(found)) == ("laptop", True)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert not authenticator.is_current(found)
    assert refusal(authenticator, bearer(TOKEN)) == (Code.UNAUTHENTICATED, "TOKEN_ENDED")


def test_a_token_that_leaves_the_file_is_refused_at_once() -> None:
    authenticator = of_file(grant())
    found = authenticator.authenticate(bearer(TOKEN), context())
    authenticator.replace(())
    assert not authenticator.is_current(found)
    assert refusal(authenticator, bearer(TOKEN)) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")
    assert not authenticator.is_open


@pytest.mark.parametrize("changes", [{"tenant": "bank"}, {"scopes": frozenset({"create"})}])
def test_a_grant_that_loses_what_it_allowed_is_no_longer_current(changes: dict[str, Any]) -> None:
    authenticator = of_file(grant())
    found = authenticator.authenticate(bearer(TOKEN), context())
    authenticator.replace([grant(scopes=frozenset({"read", "create"}))])
    assert authenticator.is_current(found)
    authenticator.replace([grant(**changes)])
    assert not authenticator.is_current(found)


def test_a_token_with_fewer_than_128_bits_is_refused() -> None:
    short = "b" * 21
    assert refusal(of_file(grant(short)), bearer(short)) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")
    assert of_file(grant(short + "b")).authenticate(bearer(short + "b"), context())


def test_a_certificate_names_its_tenant() -> None:
    authenticator = Authenticator(certificates=True)
    found = authenticator.authenticate(
        Metadata(()), context(peer_uri=[b"https://shop.test", b"postroad://tenant/shop"])
    )
    assert (found.tenant, found.scopes) == ("shop", TENANT_SCOPES)
    assert authenticator.is_current(found)


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"peer_uri": [b"postroad://tenant/"]},
        {"peer_uri": [b"postroad://tenant/shop/x"]},
        {"peer_uri": [b"postroad://tenant/sh%6fp"]},
        {"peer_uri": [b"postroad://tenant/shop", b"postroad://tenant/bank"]},
        {
            "peer_dns": [b"postroad://tenant/shop"],
            "x509_subject_alternative_name": [b"postroad://tenant/shop"],
        },
    ],
)
def test_a_certificate_without_one_tenant_is_refused(properties: dict[str, list[bytes]]) -> None:
    authenticator = Authenticator(certificates=True)
    assert refusal(authenticator, Metadata(()), context(**properties)) == (
        Code.UNAUTHENTICATED,
        "TENANT_MISSING",
    )


def test_a_bad_token_is_refused_whatever_the_certificate() -> None:
    authenticator = Authenticator(certificates=True)
    where = context(peer_uri=[b"postroad://tenant/shop"])
    assert refusal(authenticator, bearer(TOKEN), where) == (Code.UNAUTHENTICATED, "TOKEN_UNKNOWN")


def test_a_peer_that_keeps_failing_is_slowed_down_and_its_valid_token_is_not() -> None:
    authenticator = of_file(grant())
    for port in range(BURST):
        assert (
            refusal(authenticator, Metadata(()), context(f"ipv4:192.0.2.1:{port}"))[0] is Code.UNAUTHENTICATED
        )
    with pytest.raises(StatusError) as caught:
        authenticator.authenticate(Metadata(()), context())
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_FAILED_ATTEMPTS")
    [delay] = [d.retry_delay for d in caught.value.details if hasattr(d, "retry_delay")]
    assert 0 < delay.ToMilliseconds() <= 1000
    assert authenticator.authenticate(bearer(TOKEN), context()).tenant == "shop"
    assert refusal(authenticator, Metadata(()), context("ipv4:192.0.2.2:1"))[0] is Code.UNAUTHENTICATED


def test_a_peer_regains_one_attempt_a_second() -> None:
    attempts = FailedAttempts()
    assert [attempts.count("a", 0.0) for _ in range(BURST)] == [0.0] * BURST
    assert attempts.count("a", 0.0) == 1.0
    assert attempts.count("a", 0.25) == 0.75
    assert attempts.count("a", 1.0) == 0.0
    assert attempts.count("a", 1.0) == 1.0
    assert [attempts.count("a", 100.0) for _ in range(BURST)] == [0.0] * BURST


def test_the_peers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_attempts, "MAX_PEERS", 10)
    attempts = FailedAttempts()
    for number in range(1000):
        attempts.count(str(number), 0.0)
        # One that goes on failing is not forgotten for others.
        attempts.count("busy", 0.0)
    assert len(attempts) == 10
    assert attempts.count("busy", 0.0) > 0


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:443", "192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:443", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:443", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:443", "fe80::/64"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_a_peer_is_known_by_its_address(peer: str, address: str) -> None:
    assert peer_address(peer) == address
