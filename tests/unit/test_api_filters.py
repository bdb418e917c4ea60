"""The filter of a List: both spellings of `_filters`, and the typed fields."""

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postroad.v1.task_service_pb2 import CountRequest, ListRequest, WatchRequest
from services.api.errors import InvalidArgument
from services.api.filters import Filter, parse
from services.common.statuses import STATUSES


def parsed(request: object) -> Filter:
    return parse(ParseDict(request, ListRequest()))  # type: ignore[arg-type]


def refused(request: object) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        parsed(request)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize("status", STATUSES)
def test_both_spellings_and_the_typed_field_mean_the_same(status: str) -> None:
    expected = Filter(status=(status,))
    assert parsed({"_filters": {"fields": {"status": {"string_value": status}}}}) == expected
    assert parsed({"_filters": {"fields": {"status": {"stringValue": status}}}}) == expected
    assert parsed({"_filters": {"status": status}}) == expected
    assert parsed({"status": [status]}) == expected
    assert parsed({"status": [status], "_filters": {"status": status}}) == expected
    request = ListRequest()
    request._filters.fields["status"].string_value = status
    assert parse(request) == expected


@pytest.mark.parametrize("request_", [{}, {"_filters": {}}, {"_filters": {"fields": {}}}, {"email": ""}])
def test_an_empty_filter_selects_everything(request_: object) -> None:
    assert parsed(request_) == Filter()


def test_several_statuses() -> None:
    expected = Filter(status=("failed", "pending"))
    assert parsed({"status": ["pending", "failed", "pending"]}) == expected
    assert parsed({"_filters": {"status": ["failed", "pending"]}}) == expected
    literal = {"list_value": {"values": [{"string_value": "failed"}, {"string_value": "pending"}]}}
    assert parsed({"_filters": {"fields": {"status": literal}}}) == expected


def test_every_field() -> None:
    plain = {
        "status": "failed",
        "email": "A@Shop.Example",
        "domain": "BÜCHER.example",
        "reason": "null_mx",
        "labels": {"b": "2", "a": "1"},
        "created_from": "2026-01-02T03:04:05.0000015Z",
        "created_to": "2026-01-02T03:04:06+01:00",
    }
    expected = Filter(
        status=("failed",),
        email="A@shop.example",
        domain="xn--bcher-kva.example",
        reason="null_mx",
        labels=(("a", "1"), ("b", "2")),
        created_from=1767323045000002,
        created_to=1767319446000000,
    )
    assert parsed({"_filters": plain}) == expected
    assert parsed(plain | {"status": ["failed"]}) == expected
    assert parsed({"_filters": plain, **plain, "status": ["failed"]}) == expected
    literal = {
        "labels": {"struct_value": {"fields": {"a": {"string_value": "1"}}}},
        "email": {"string_value": "a@b.test"},
    }
    assert parsed({"_filters": {"fields": literal}}) == Filter(labels=(("a", "1"),), email="a@b.test")


@pytest.mark.parametrize(
    ("filters", "field"),
    [
        ({"status": "done"}, "_filters.status"),
        ({"status": ""}, "_filters.status"),
        ({"status": "PENDING"}, "_filters.status"),
        ({"status": 1}, "_filters.status"),
        ({"status": True}, "_filters.status"),
        ({"status": None}, "_filters.status"),
        ({"status": []}, "_filters.status"),
        ({"status": ["pending", 1]}, "_filters.status"),
        ({"status": ["pending", "done"]}, "_filters.status"),
        ({"status": {"string_value": "pending"}}, "_filters.status"),
        ({"subject": "x"}, "_filters.subject"),
        ({"email": 5}, "_filters.email"),
        ({"email": "nobody"}, "_filters.email"),
        ({"email": ["a@b.test"]}, "_filters.email"),
        ({"domain": "a b"}, "_filters.domain"),
        ({"domain": False}, "_filters.domain"),
        ({"reason": ""}, "_filters.reason"),
        ({"reason": {}}, "_filters.reason"),
        ({"labels": "a"}, "_filters.labels"),
        ({"labels": {"a": 1}}, "_filters.labels"),
        ({"created_from": "yesterday"}, "_filters.created_from"),
        ({"created_to": 1767319446}, "_filters.created_to"),
        ({"fields": "x"}, "_filters.fields"),
        ({"fields": {"status": {"string_value": "pending"}}, "x": 1}, "_filters.fields"),
        ({"fields": {"status": {"string_value": "done"}}}, "_filters.fields.status"),
        ({"fields": {"status": {"number_value": 1}}}, "_filters.fields.status"),
        ({"fields": {"status": {"string_value": 1}}}, "_filters.fields.status"),
        ({"fields": {"status": {"bool_value": True}}}, "_filters.fields.status"),
        ({"fields": {"status": {"string_value": "pending", "x": 1}}}, "_filters.fields.status"),
        ({"fields": {"status": "pending"}}, "_filters.fields.status"),
        ({"fields": {"status": {"list_value": {"values": ["pending"]}}}}, "_filters.fields.status"),
        ({"fields": {"nope": {"string_value": "pending"}}}, "_filters.fields.nope"),
    ],
)
def test_invalid_filters_are_refused_by_name(filters: object, field: str) -> None:
    violations = refused({"_filters": filters})
    assert field in violations


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"status": ["nope"]}, "status"),
        ({"status": [""]}, "status"),
        ({"email": "x"}, "email"),
        ({"domain": "-x-"}, "domain"),
        ({"reason": "r" * 65}, "reason"),
        ({"status": ["pending"], "_filters": {"status": "failed"}}, "_filters.status"),
    ],
)
def test_invalid_typed_fields_are_refused_by_name(request_: object, field: str) -> None:
    assert refused(request_) == [field]


def test_a_timestamp_out_of_range_is_refused() -> None:
    for seconds, nanos in [(1, -1), (1, 10**9), (253402300800, 0), (-62135596801, 0)]:
        request = ListRequest()
        request.created_from.seconds, request.created_from.nanos = seconds, nanos
        with pytest.raises(InvalidArgument) as caught:
            parse(request)
        assert [v.field for v in caught.value.violations] == ["created_from"]


json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["fields", "status", "labels", "string_value", "list_value", "values", "x"]),
            inner,
            max_size=3,
        )
    ),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["fields", "status", "email", "labels", "x"]), json, max_size=3))
def test_any_struct_is_a_filter_or_a_refusal(filters: object) -> None:
    try:
        parsed({"_filters": filters})
    except InvalidArgument as refusal:
        named = [violation.field for violation in refusal.violations]
    else:
        named = []
    assert all(field.startswith("_filters.") for field in named)


LABELS = {f"{n:063}": "v" * 255 for n in range(64)}


def test_a_filter_may_have_as_many_labels_as_a_task() -> None:
    expected = Filter(labels=tuple(LABELS.items()))
    literal = {key: {"string_value": value} for key, value in LABELS.items()}
    assert parsed({"labels": LABELS}) == parsed({"_filters": {"labels": LABELS}}) == expected
    spelled = {"fields": {"labels": {"struct_value": {"fields": literal}}}}
    assert parsed({"_filters": spelled}) == expected


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        (LABELS | {"one": "more"}, ""),
        ({"": "v"}, '[""]'),
        ({"k" * 64: "v"}, f'["{"k" * 40}…"]'),
        ({"k": "é" * 128}, '["k"]'),
        ({"k": "a\nb"}, '["k"]'),
    ],
)
def test_labels_that_no_task_can_have_are_refused(labels: dict[str, str], field: str) -> None:
    assert refused({"labels": labels}) == [f"labels{field}"]
    assert refused({"_filters": {"labels": labels}}) == [f"_filters.labels{field}"]


@pytest.mark.parametrize(
    "filters",
    [
        {f"x{n}": None for n in range(501)},
        {"fields": {f"x{n}": {"string_value": ""} for n in range(300)}},
        {"status": ["pending"] * 501},
        {"labels": {"a": [[[None] * 50] * 50]}},
    ],
)
def test_a_struct_with_too_many_values_is_refused_unread(filters: object) -> None:
    assert refused({"_filters": filters}) == ["_filters"]


def test_too_many_statuses_are_refused() -> None:
    assert refused({"status": ["pending"] * 501}) == ["status"]


def test_each_filter_has_its_own_digest() -> None:
    filters = [Filter(), Filter(status=("failed",)), Filter(email="failed"), Filter(domain="failed")]
    digests = {f.digest(tenant) for f in filters for tenant in ("a", "b")}
    assert len(digests) == 8
    assert Filter(email="a@b.test").digest("a") == Filter(email="a@b.test").digest("a")


def test_counts_and_watches_filter_by_the_fields_that_they_have() -> None:
    times = {"created_from": "2026-01-02T03:04:05Z", "created_to": "2026-01-02T03:04:06Z"}
    common = {"status": ["failed"], "email": "a@b.test", "reason": "null_mx", "labels": {"a": "1"}}
    count = ParseDict(common | times, CountRequest())
    assert parse(count) == parsed(common | times)
    assert parse(ParseDict({"_filters": common | times}, CountRequest())) == parsed(common | times)
    assert parse(ParseDict(common, WatchRequest())) == parsed(common)
    with pytest.raises(InvalidArgument) as caught:
        parse(ParseDict({"_filters": common | times}, WatchRequest()))
    assert [violation.field for violation in caught.value.violations] == [
        "_filters.created_from",
        "_filters.created_to",
    ]
