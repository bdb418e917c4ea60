"""The api over the wire, with a client built on reflection: which requests it accepts and refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.api_process import ApiProcess, Installation
from tests.reflection_client import ReflectionClient
from tests.stack import Infra

TASKS = "postroad.v1.TaskService"
CREATE, GET, LIST = f"{TASKS}/Create", f"{TASKS}/Get", f"{TASKS}/List"


@pytest.fixture(scope="module")
def installation(infra: Infra) -> Installation:
    return Installation(infra)


@pytest.fixture(scope="module")
def api(installation: Installation) -> Iterator[ApiProcess]:
    with ApiProcess(installation) as process:
        yield process


@pytest.fixture(scope="module")
def client(api: ApiProcess) -> Iterator[ReflectionClient]:
    with ReflectionClient(api.target) as client:
        yield client


def mail(**data: Any) -> dict[str, Any]:
    base = {"email": "a@shop.test", "subject": "Hello", "body": "text"}
    return {"data": {key: value for key, value in (base | data).items() if value is not None}}


def literal(**fields: Any) -> dict[str, Any]:
    """Return a ListRequest whose filter spells out the Struct's own message."""
    return {"_filters": {"fields": fields}}


def details(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details of an error by their names."""
    [raw] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for detail in status.details:
        kind = getattr(error_details_pb2, detail.type_url.rsplit(".", 1)[1])
        found[kind.__name__] = kind.FromString(detail.value)
    return found


def varint(number: int) -> bytes:
    """Return a number as protobuf encodes it."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


BAD_CREATES: list[tuple[str, Any, str]] = [
    ("nothing", {}, "data.email"),
    ("no subject at all", {}, "data.subject"),
    ("no body at all", {}, "data.body"),
    ("empty data", {"data": {}}, "data.email"),
    ("no email", mail(email=None), "data.email"),
    ("empty email", mail(email=""), "data.email"),
    ("blank email", mail(email="  "), "data.email"),
    ("no at sign", mail(email="shop.test"), "data.email"),
    ("no local part", mail(email="@shop.test"), "data.email"),
    ("no domain", mail(email="a@"), "data.email"),
    ("one label", mail(email="a@localhost"), "data.email"),
    ("not in the DNS", mail(email="a@x.local"), "data.email"),
    ("two addresses", mail(email="a@shop.test, b@shop.test"), "data.email"),
    ("display name", mail(email="Ann <a@shop.test>"), "data.email"),
    ("address literal", mail(email="a@[192.0.2.1]"), "data.email"),
    ("IP address", mail(email="a@192.0.2.1"), "data.email"),
    ("two dots", mail(email="a..b@shop.test"), "data.email"),
    ("quoted local part", mail(email='"a b"@shop.test'), "data.email"),
    ("long local part", mail(email="a" * 65 + "@shop.test"), "data.email"),
    ("long label", mail(email="a@" + "b" * 64 + ".test"), "data.email"),
    ("long address", mail(email="a@" + "b." * 150 + "test"), "data.email"),
    ("enormous address", mail(email="a" * 1_000_000 + "@shop.test"), "data.email"),
    ("header injection", mail(email="a@shop.test\r\nBcc: b@shop.test"), "data.email"),
    ("NUL in the email", mail(email="a\0@shop.test"), "data.email"),
    ("U+2028 in the email", mail(email="a\u2028b@shop.test"), "data.email"),
    ("U+2029 in the email", mail(email="a\u2029b@shop.test"), "data.email"),
    ("U+0085 in the email", mail(email="a\u0085b@shop.test"), "data.email"),
    ("bidirectional override", mail(email="a\u202eb@shop.test"), "data.email"),
    ("bad A-label", mail(email="a@xn--0.test"), "data.email"),
    ("no subject", mail(subject=None), "data.subject"),
    ("empty subject", mail(subject=""), "data.subject"),
    ("blank subject", mail(subject=" \u00a0"), "data.subject"),
    ("LF in the subject", mail(subject="a\nb"), "data.subject"),
    ("CR in the subject", mail(subject="a\rb"), "data.subject"),
    ("NUL in the subject", mail(subject="a\0b"), "data.subject"),
    ("tab in the subject", mail(subject="a\tb"), "data.subject"),
    ("escape in the subject", mail(subject="a\x1b[31m"), "data.subject"),
    ("long subject", mail(subject="s" * 999), "data.subject"),
    ("subject too long once encoded", mail(subject="é" * 400), "data.subject"),
    ("no body", mail(body=None), "data.body"),
    ("large body", mail(body="b" * (524288 + 1)), "data.body"),
    ("large body in bytes", mail(body="é" * 262144 + "b"), "data.body"),
    ("large HTML", mail(html="h" * (524288 + 1)), "data.html"),
    ("text and HTML together", mail(body="b" * 262144, html="h" * 262145), "data.html"),
    ("far too large", mail(body="b" * 10_000_000), "request"),
    ("From", mail(headers={"From": "x@shop.test"}), 'data.headers["From"]'),
    ("bcc", mail(headers={"bcc": "x@shop.test"}), 'data.headers["bcc"]'),
    ("Content-Type", mail(headers={"Content-Type": "text/plain"}), 'data.headers["Content-Type"]'),
    ("header name with a space", mail(headers={"X A": "v"}), 'data.headers["X A"]'),
    ("header name with a colon", mail(headers={"X:A": "v"}), 'data.headers["X:A"]'),
    ("empty header name", mail(headers={"": "v"}), 'data.headers[""]'),
    ("header injection by value", mail(headers={"X-A": "v\r\nBcc: x@shop.test"}), 'data.headers["X-A"]'),
    ("header injection by name", mail(headers={"X-A\r\nBcc": "v"}), 'data.headers["X-A\\r\\nBcc"]'),
    ("empty header", mail(headers={"X-A": ""}), 'data.headers["X-A"]'),
    ("long header", mail(headers={"X-A": "v" * 999}), 'data.headers["X-A"]'),
    ("many headers", mail(headers={f"X-{n}": "v" for n in range(51)}), "data.headers"),
    ("empty label", mail(labels={"": "v"}), 'data.labels[""]'),
    ("long label value", mail(labels={"k": "v" * 256}), 'data.labels["k"]'),
    ("NUL in a label", mail(labels={"k": "\0"}), 'data.labels["k"]'),
    ("many labels", mail(labels={f"k{n}": "v" for n in range(65)}), "data.labels"),
    ("long key", mail() | {"idempotency_key": "k" * 256}, "idempotency_key"),
    ("long key in bytes", mail() | {"idempotency_key": "é" * 128}, "idempotency_key"),
    ("LF in the key", mail() | {"idempotency_key": "a\nb"}, "idempotency_key"),
]

BAD_LISTS: list[tuple[str, Any, str]] = [
    ("negative page", {"page_size": -1}, "page_size"),
    ("very negative page", {"page_size": -(2**31)}, "page_size"),
    ("token of nobody", {"page_token": "nonsense"}, "page_token"),
    ("token not in base64", {"page_token": "ü/.."}, "page_token"),
    ("unknown status", {"status": ["sent"]}, "status"),
    ("empty status", {"status": [""]}, "status"),
    ("status in capitals", {"status": ["PENDING"]}, "status"),
    ("no address", {"email": "shop"}, "email"),
    ("no domain", {"domain": "a b"}, "domain"),
    ("long reason", {"reason": "r" * 65}, "reason"),
    ("unknown filter", {"_filters": {"colour": "red"}}, "_filters.colour"),
    ("status of another type", {"_filters": {"status": 7}}, "_filters.status"),
    ("status null", {"_filters": {"status": None}}, "_filters.status"),
    ("status unknown", {"_filters": {"status": "done"}}, "_filters.status"),
    ("literal, unknown status", literal(status={"string_value": "x"}), "_filters.fields.status"),
    ("literal, a number", literal(status={"number_value": 1}), "_filters.fields.status"),
    ("literal, a status that is no Value", literal(status="pending"), "_filters.fields.status"),
    ("literal, unknown filter", literal(x={"string_value": "y"}), "_filters.fields.x"),
    ("email of another type", {"_filters": {"email": True}}, "_filters.email"),
    ("labels of another type", {"_filters": {"labels": ["a"]}}, "_filters.labels"),
    ("no time", {"_filters": {"created_from": "today"}}, "_filters.created_from"),
    ("two values", {"status": ["failed"], "_filters": {"status": "pending"}}, "_filters.status"),
]

KNOWN_FORM = "01a20d60-a168-78ed-bffa-fe7deb5d53ef"
BAD_IDS = ["", "x", "0" * 32, f"{{{KNOWN_FORM}}}", KNOWN_FORM[:-1] + "g", KNOWN_FORM + "\n", "\0", "1"]

DATA = field(1, b"a@shop.test") + field(2, b"Hello") + field(3, b"text")
UNDECODABLE = [
    ("garbage", CREATE, b"\xff" * 20),
    ("cut short", CREATE, field(1, DATA)[:-3]),
    ("a subject that is not UTF-8", CREATE, field(1, field(1, b"a@shop.test") + field(2, b"\xff\xfe"))),
    ("a lone surrogate", CREATE, field(1, DATA + field(3, b"\xed\xa0\x80"))),
    ("an email that is not UTF-8", CREATE, field(1, field(1, b"a\xc3@shop.test"))),
    ("a key that is not UTF-8", CREATE, field(1, DATA) + field(2, b"\x80")),
    ("wire type 7", CREATE, b"\x0f"),
    ("text for a message", CREATE, b"hello"),
    ("garbage", GET, b"\xff\xff"),
    ("an id that is not UTF-8", GET, field(1, b"\xff")),
    ("garbage", LIST, b"\x0a\x7f"),
    ("a status that is not UTF-8", LIST, field(4, b"\xff")),
    ("groups without an end", LIST, b"\x0b" * 200),
]

TABLE = [
    *(pytest.param(CREATE, request, name, id=f"create: {label}") for label, request, name in BAD_CREATES),
    *(pytest.param(LIST, request, name, id=f"list: {label}") for label, request, name in BAD_LISTS),
    *(pytest.param(GET, {"id": id_}, "id", id=f"get: {id_!r}") for id_ in BAD_IDS),
    *(pytest.param(rpc, raw, "request", id=f"{rpc[-6:]}: {label}") for label, rpc, raw in UNDECODABLE),
]


@pytest.mark.parametrize(("rpc", "request_", "named"), TABLE)
def test_an_invalid_request_is_refused_by_its_field_and_the_api_continues(
    client: ReflectionClient, rpc: str, request_: Any, named: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.raw(rpc, request_) if isinstance(request_, bytes) else client.call(rpc, request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = details(caught.value)
    assert named in [violation.field for violation in found["BadRequest"].field_violations]
    assert all(violation.description for violation in found["BadRequest"].field_violations)
    assert found["ErrorInfo"].reason == "INVALID_REQUEST"
    assert client.call(CREATE, mail())["status"] == "pending"
    assert client.call("grpc.health.v1.Health/Check", {"service": TASKS}) == {"status": "SERVING"}


def test_all_invalid_fields_of_a_list_are_named_at_once(client: ReflectionClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(LIST, {"page_size": -1, "email": "x", "_filters": {"status": "y"}})
    named = [violation.field for violation in details(caught.value)["BadRequest"].field_violations]
    assert named == ["page_size", "email", "_filters.status"]


def test_the_table_has_many_rows() -> None:
    assert len(TABLE) >= 60


@pytest.mark.parametrize(
    ("request_", "shown"),
    [
        (mail(), {}),
        (mail(email="Ann.Lee+x@SHOP.Test"), {"email": "Ann.Lee+x@shop.test"}),
        (mail(email="a@example.com"), {}),
        (mail(email="a@shop.example"), {}),
        (mail(email="a@shop.invalid"), {}),
        (mail(email="a@BÜCHER.test"), {"email": "a@bücher.test"}),
        (mail(email="用户@例え.test"), {}),
        (mail(email="a" * 64 + "@" + "b" * 63 + ".test"), {}),
        (mail(subject="s" * 998), {}),
        (mail(subject="é" * 300), {}),
        (mail(subject="line\u2028and\u2029and\u0085end"), {}),
        (mail(subject=" 👍🏽 "), {}),
        (mail(body=""), {}),
        (mail(body="\0\x01\r\n.\r\n\u2028👍"), {}),
        (mail(body="b" * 524288), {}),
        (mail(body="é" * 131072, html="h" * 262144), {}),
        (mail(body=None, html="<p>only</p>"), {}),
        (mail(headers={"Reply-To": "b@shop.test", "X-A": "é"}), {}),
        (mail(labels={"campaign": "Mai 2026", "ключ": "значение", "quote\"'\\": "\\\"'%_"}), {}),
        (mail() | {"idempotency_key": "é" * 127}, {}),
    ],
)
def test_an_accepted_task_is_returned_as_it_was_given(
    client: ReflectionClient, request_: dict[str, Any], shown: dict[str, str]
) -> None:
    created = client.call(CREATE, request_)
    data = request_["data"]
    assert created["status"] == "pending"
    assert created["email"] == shown.get("email", data["email"])
    assert created["subject"] == data["subject"]
    assert created.get("labels", {}) == data.get("labels", {})
    assert created["created_at"] == created["updated_at"]
    got = client.call(GET, {"id": created["id"].upper()})
    assert got.pop("body", "") == data.get("body", "")
    assert got.pop("html", "") == data.get("html", "")
    assert got == created


def test_an_unknown_id_is_not_found(client: ReflectionClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(GET, {"id": KNOWN_FORM})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)["ErrorInfo"].reason == "TASK_NOT_FOUND"


@pytest.mark.parametrize("rpc", ["Get", "List", "Count", "Retry", "Cancel", "Resolve"])
def test_a_query_as_large_as_a_mail_is_refused_undecoded(client: ReflectionClient, rpc: str) -> None:
    # Decoding would skip this unknown field.
    with pytest.raises(grpc.RpcError) as caught:
        client.raw(f"{TASKS}/{rpc}", field(500, b"x" * (256 << 10)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details(caught.value)["BadRequest"].field_violations] == [
        "request"
    ]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_and_health(api: ApiProcess, version: str) -> None:
    with ReflectionClient(api.target, version) as client:
        reflections = {f"grpc.reflection.{each}.ServerReflection" for each in ("v1", "v1alpha")}
        assert {TASKS, "grpc.health.v1.Health", *reflections} == set(client.services())
        assert client.call("grpc.health.v1.Health/Check", {}) == {"status": "SERVING"}
        for service in reflections:
            assert client.method(f"{service}/ServerReflectionInfo").input_type.full_name.startswith(
                service.removesuffix("ServerReflection")
            )


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ([("idempotency-key-bin", b"\0key")], "idempotency-key-bin"),
        ([("idempotency-key-bin", b"a"), ("idempotency-key-bin", b"b")], "idempotency-key-bin"),
        ([("idempotency-key", "a"), ("idempotency-key-bin", b"a")], "idempotency-key-bin"),
        ([("idempotency-key", "a"), ("idempotency-key", "b")], "idempotency-key"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused_by_its_name(
    client: ReflectionClient, metadata: list[tuple[str, Any]], named: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(CREATE, mail(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = details(caught.value)["BadRequest"].field_violations
    assert violation.field == named


def test_the_same_key_twice_in_the_metadata_is_one(client: ReflectionClient) -> None:
    metadata = [("idempotency-key", "twice"), ("idempotency-key", "twice")]
    first, second = (client.call(CREATE, mail(), metadata=metadata) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("character", ["a", "👍"])
def test_the_largest_refusal_stays_below_8_kib_of_trailers(api: ApiProcess, character: str) -> None:
    asked = mail(
        email=character * 200,
        headers={f"{character * 30}{n}": character * 900 for n in range(50)},
        labels={f"{character * 60}{n}": character * 300 for n in range(64)},
    )
    limits = [("grpc.max_metadata_size", 8192), ("grpc.absolute_max_metadata_size", 8192)]
    with ReflectionClient(api.target, options=limits) as client, pytest.raises(grpc.RpcError) as caught:
        client.call(CREATE, asked)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert len(details(caught.value)["BadRequest"].field_violations) >= 5


def test_unknown_fields_are_tolerated(client: ReflectionClient) -> None:
    client.raw(CREATE, field(1, DATA + field(500, b"from the future")) + field(501, b"x"))


def test_two_replicas_cannot_share_a_port_by_mistake(installation: Installation, api: ApiProcess) -> None:
    second = ApiProcess(installation, POSTROAD_LISTEN=api.target)
    second.start()
    assert second.process is not None
    assert second.process.wait(30) == 1
    assert "cannot listen" in second.log()


def test_a_bad_token_setting_ends_the_process_at_once(installation: Installation) -> None:
    broken = ApiProcess(installation, POSTROAD_API_TOKENS="shop:s3cretsecret,nonsense")
    broken.start()
    assert broken.process is not None
    assert broken.process.wait(30) != 0
    assert "s3cret" not in broken.log()


def test_the_c_extensions_are_in_use() -> None:
    """A silent fallback to pure Python would cost at least 190 us a task."""
    code = (
        "import services.api.service, mysql.connector as m;"
        "from google.protobuf.internal import api_implementation as a;"
        "assert a.Type() == 'upb' and m.HAVE_CEXT"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tenants_see_their_own_tasks_only(installation: Installation) -> None:
    tokens = {"shop": "shop-secret", "bank": "bank-secret"}
    given = ",".join(f"{tenant}:{token}" for tenant, token in tokens.items())
    with (
        ApiProcess(installation, POSTROAD_API_TOKENS=given) as api,
        ReflectionClient(api.target, metadata=[("authorization", "Bearer bank-secret")]) as client,
    ):

        def call(tenant: str, rpc: str, data: Any) -> dict[str, Any]:
            return client.call(rpc, data, metadata=[("authorization", f"Bearer {tokens[tenant]}")])

        key = {"idempotency_key": "the same in both"}
        shop, bank = (call(tenant, CREATE, mail() | key) for tenant in ("shop", "bank"))
        assert shop["id"] != bank["id"]
        assert call("shop", GET, {"id": shop["id"]})["id"] == shop["id"]
        assert [task["id"] for task in call("bank", LIST, {})["results"]] == [bank["id"]]
        with pytest.raises(grpc.RpcError) as caught:
            call("bank", GET, {"id": shop["id"]})
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", tokens["shop"])]):
            for rpc, request in ((CREATE, mail()), (GET, {"id": shop["id"]}), (LIST, {})):
                with pytest.raises(grpc.RpcError) as caught:
                    client.call(rpc, request, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        # Health checks need no token.
        assert client.call("grpc.health.v1.Health/Check", {})["status"] == "SERVING"
        assert not any(token in api.log() for token in tokens.values())
