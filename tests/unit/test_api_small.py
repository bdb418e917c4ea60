"""Page tokens, ids, bearer tokens and the errors' details."""

from __future__ import annotations

import asyncio
import base64
import uuid
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1.task_service_pb2 import BatchCreateRequest, CreateRequest, TaskData
from services.api import errors, page_tokens, uuid7
from services.api.auth import Tenants
from services.api.call import Call, Metadata, set_call
from services.api.task_service import TaskService

# --- pages --------------------------------------------------------------------------------------


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_a_token_leads_back_to_its_id(last: bytes, digest: bytes) -> None:
    token = page_tokens.encode(last, digest)
    assert page_tokens.decode(token, digest) == last
    with pytest.raises(errors.InvalidArgument):
        page_tokens.decode(token, bytes(16) if digest != bytes(16) else b"x" * 16)


def test_no_token_is_the_first_page() -> None:
    assert page_tokens.decode("", b"d") is None


@given(st.text(max_size=60))
def test_what_is_not_ours_is_refused(text: str) -> None:
    if text:
        with pytest.raises(errors.InvalidArgument) as caught:
            page_tokens.decode(text, b"d" * 16)
        assert caught.value.violations[0].field == "page_token"


def test_a_token_that_was_changed_is_refused() -> None:
    digest = b"d" * 16
    token = page_tokens.encode(bytes(range(16)), digest)
    raw = base64.urlsafe_b64decode(token + "==="[: -len(token) % 4])
    others = [token + "=", token + " ", token[:-1], token.lower(), token + token]
    others += [
        base64.urlsafe_b64encode(raw[:n] + bytes([raw[n] ^ 1]) + raw[n + 1 :]).decode().rstrip("=")
        for n in range(len(raw))
    ]
    for other in others:
        with pytest.raises(errors.InvalidArgument):
            page_tokens.decode(other, digest)


def test_page_sizes() -> None:
    assert [page_tokens.page_size(n) for n in (0, 1, 50, 1000, 1001, 2**31 - 1)] == [
        50,
        1,
        50,
        1000,
        1000,
        1000,
    ]
    for bad in (-1, -(2**31)):
        with pytest.raises(errors.InvalidArgument):
            page_tokens.page_size(bad)


# --- ids ----------------------------------------------------------------------------------------


def test_ids_are_uuid7_and_rise_strictly_whatever_the_clock_does() -> None:
    times = iter([5_000_000, 5_000_999, 5_001_000, 3_000_000, 3_000_000, 9_000_000_000_000_000])
    clock = uuid7.Clock(lambda: next(times))
    drawn = [clock.draw() for _ in range(6)]
    assert [us for _, us in drawn] == [5000, 5001, 5002, 5003, 5004, 9_000_000_000_000]
    assert sorted(drawn) == drawn
    for id_, us in drawn:
        parsed = uuid.UUID(bytes=id_)
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert int.from_bytes(id_[:6], "big") == us // 1000
        assert uuid7.text(id_) == str(parsed)
        assert uuid7.parse(uuid7.text(id_)) == uuid7.parse(uuid7.text(id_).upper()) == id_


@given(st.integers(0, 2**48 * 1000 - 1), st.integers(0, 2**48 * 1000 - 1))
def test_a_range_of_times_is_a_range_of_ids(us: int, bound: int) -> None:
    id_, at = uuid7.Clock(lambda: us * 1000).draw() if us else uuid7.Clock(lambda: 1000).draw()
    assert (id_ >= uuid7.lowest(bound)) == (at >= bound)


def test_bounds_outside_of_what_an_id_can_tell() -> None:
    id_, _ = uuid7.Clock().draw()
    assert uuid7.lowest(-(10**18)) < id_ < uuid7.lowest(10**18)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "0" * 32,
        "urn:uuid:" + "0" * 36,
        "{00000000-0000-7000-8000-000000000000}",
        "00000000-0000-7000-8000-00000000000g",
        "00000000-0000-7000-8000-000000000000\n",
        "\u06600000000-0000-7000-8000-000000000000",
    ],
)
def test_malformed_ids(value: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        uuid7.parse(value)


# --- metadata -----------------------------------------------------------------------------------


def test_a_key_with_two_values_has_none() -> None:
    metadata = Metadata([("a", "1"), ("b", "1"), ("b", "2"), ("c", "3"), ("c", "3")])
    assert metadata == {"a": "1", "c": "3"}
    assert metadata.repeated == {"b"}


def test_two_tokens_are_none() -> None:
    metadata = Metadata([("authorization", "Bearer s3cret-one"), ("authorization", "Bearer s3cret-two")])
    with pytest.raises(errors.StatusError) as caught:
        Tenants("shop:s3cret-one,bank:s3cret-two").tenant(metadata)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


# --- tenants ------------------------------------------------------------------------------------


def test_without_tokens_everyone_is_the_default_tenant() -> None:
    assert Tenants("").tenant({"authorization": "Bearer whatever"}) == "default"


def test_a_token_tells_its_tenant() -> None:
    tenants = Tenants("shop:s3cret-one, shop:s3cret-two,bank:x:y:z:12345")
    assert tenants.tenant({"authorization": "Bearer s3cret-one"}) == "shop"
    assert tenants.tenant({"authorization": "bearer  s3cret-two"}) == "shop"
    assert tenants.tenant({"authorization": "Bearer x:y:z:12345"}) == "bank"
    for bad in ("", "Bearer", "Bearer ", "Bearer s3cret-onE", "Basic s3cret-one", "s3cret-one"):
        with pytest.raises(errors.StatusError) as caught:
            tenants.tenant({"authorization": bad})
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(errors.StatusError):
        tenants.tenant({})


@pytest.mark.parametrize(
    "tokens",
    ["shop", "shop:", ":s3cret-one", "sh op:s3cret-one", "a:s3cret-one,b:s3cret-one", "shop:short", ",", " "],
)
def test_bad_token_settings_are_refused_without_showing_a_token(tokens: str) -> None:
    with pytest.raises(ValueError, match="pair") as caught:
        Tenants(tokens)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("shop", "TENANT:TOKEN"),
        (",", "TENANT:TOKEN"),
        ("-shop:s3cret-one", "tenant of pair 1"),
        ("shop:s3cret-one,bank:short", "token of pair 2 is not 8 or more visible ASCII characters"),
        ("shop:s3crét-one", "visible ASCII"),
        ("shop:s3cret\t-one", "visible ASCII"),
    ],
)
def test_a_bad_token_setting_is_told_by_what_is_wrong_with_it(tokens: str, says: str) -> None:
    with pytest.raises(ValueError, match="pair") as caught:
        Tenants(tokens)
    assert says in str(caught.value)


# --- errors -------------------------------------------------------------------------------------


def unpack(problem: errors.StatusError) -> list[object]:
    kinds = [error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]
    unpacked = []
    for detail in problem.status().details:
        [kind] = [kind for kind in kinds if detail.Is(kind.DESCRIPTOR)]
        message = kind()
        detail.Unpack(message)
        unpacked.append(message)
    return unpacked


def test_a_refusal_names_fifty_fields_at_most_and_fits_into_the_metadata() -> None:
    many = errors.InvalidArgument(
        [errors.FieldViolation(f"data.labels[{n}]", "has control characters") for n in range(80)]
    )
    bad, info = unpack(many)
    assert len(bad.field_violations) == 50  # type: ignore[attr-defined]
    assert info.reason == "INVALID_REQUEST"  # type: ignore[attr-defined]
    long = errors.InvalidArgument([errors.FieldViolation("é" * 500, "é" * 5000)] * 80)
    assert len(unpack(long)[0].field_violations) >= 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("character", ["a", "%", "é", "字", "👍", "\x7f", "\n"])
@pytest.mark.parametrize(("field", "description"), [(1, 1), (40, 20), (120, 300), (500, 5000)])
def test_all_of_a_refusal_fits_into_8_kib_of_trailers(character: str, field: int, description: int) -> None:
    violation = errors.FieldViolation(character * field, character * description)
    problem = errors.InvalidArgument([violation] * 80)
    message, details = problem.message.encode(), problem.status().SerializeToString()
    # The message is percent-encoded, the details are in base64. An entry counts 32 octets more than its name
    # and value (RFC 9113 section 6.5.2).
    lengths = {
        ":status": 3,
        "content-type": len("application/grpc"),
        "grpc-status": 2,
        "grpc-message": sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message),
        "grpc-status-details-bin": len(base64.b64encode(details)),
    }
    assert sum(len(name) + size + 32 for name, size in lengths.items()) < 8192
    assert unpack(problem)[0].field_violations  # type: ignore[attr-defined]


def test_what_passes_says_when_to_come_back() -> None:
    for problem in (errors.overloaded(0.5), errors.database_unavailable()):
        _, retry = unpack(problem)
        assert retry.retry_delay.ToMilliseconds() > 0  # type: ignore[attr-defined]


def test_a_conflict_names_the_original() -> None:
    [info] = unpack(errors.idempotency_conflict("the-id"))
    assert info.metadata["id"] == "the-id"  # type: ignore[attr-defined]


# --- batches ------------------------------------------------------------------------------------


async def test_a_batch_whose_items_take_long_leaves_the_loop_to_others_meanwhile() -> None:
    async def record_batch(items: list[object]) -> list[None]:
        return [None] * len(items)

    recorder: Any = SimpleNamespace(record_batch=record_batch)
    unused: Any = None
    service = TaskService(recorder, unused, unused, unused, max_body=1000)
    set_call(Call("default", Metadata(()), 0))
    # Each is parsed anew, for some milliseconds.
    senders = [", ".join(f"Ann <a{number}.{n}@example.org>" for n in range(20)) for number in range(30)]
    data = [TaskData(email="a@b.test", subject="s", body="", headers={"Reply-To": many}) for many in senders]
    request = BatchCreateRequest(requests=[CreateRequest(data=one) for one in data])
    batch = asyncio.create_task(service.BatchCreate(request, unused))
    turns = 0
    while not batch.done():
        turns += 1
        await asyncio.sleep(0)
    assert len(batch.result().results) == len(data)
    assert turns >= 5
