"""Errors of the api and their google.rpc details."""

from __future__ import annotations

import base64

import pytest
from google.rpc import error_details_pb2

from services.api import errors


def unpack(error: errors.StatusError) -> list[object]:
    kinds = [error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo]
    unpacked = []
    for detail in error.status().details:
        [kind] = [kind for kind in kinds if detail.Is(kind.DESCRIPTOR)]
        message = kind()
        detail.Unpack(message)
        unpacked.append(message)
    return unpacked


def test_an_error_names_fifty_fields_at_most() -> None:
    many = errors.InvalidArgument(
        [errors.Violation(f"data.labels[{n}]", "has control characters") for n in range(80)]
    )
    bad, info = unpack(many)
    assert len(bad.field_violations) == 50  # type: ignore[attr-defined]
    assert info.reason == "INVALID_REQUEST"  # type: ignore[attr-defined]
    long = errors.InvalidArgument([errors.Violation("é" * 500, "é" * 5000)] * 80)
    assert len(unpack(long)[0].field_violations) >= 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("character", ["a", "%", "é", "字", "👍", "\x7f", "\n"])
@pytest.mark.parametrize(("field", "description"), [(1, 1), (40, 20), (120, 300), (500, 5000)])
def test_any_error_fits_into_8_kib_of_trailers(character: str, field: int, description: int) -> None:
    violation = errors.Violation(character * field, character * description)
    error = errors.InvalidArgument([violation] * 80)
    message, details = error.message.encode(), error.status().SerializeToString()
    # gRPC percent-encodes the message and encodes the details in base64. HTTP/2 counts 32 octets for an
    # entry besides its name and value (RFC 9113 section 6.5.2).
    lengths = {
        ":status": 3,
        "content-type": len("application/grpc"),
        "grpc-status": 2,
        "grpc-message": sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in message),
        "grpc-status-details-bin": len(base64.b64encode(details)),
    }
    assert sum(len(name) + size + 32 for name, size in lengths.items()) < 8192
    assert unpack(error)[0].field_violations  # type: ignore[attr-defined]


def test_a_transient_error_says_when_to_retry() -> None:
    for error in (errors.overloaded(0.5), errors.database_unavailable()):
        _, retry = unpack(error)
        assert retry.retry_delay.ToMilliseconds() > 0  # type: ignore[attr-defined]


def test_a_conflict_names_the_original() -> None:
    [info] = unpack(errors.idempotency_conflict("the-id"))
    assert info.metadata["id"] == "the-id"  # type: ignore[attr-defined]
