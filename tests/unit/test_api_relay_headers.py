"""Header fields from which some relays take instructions: refused by default, allowed by name."""

from __future__ import annotations

from collections.abc import Container

import pytest

from postroad.v1 import events_pb2
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api.errors import InvalidArgument
from services.api.validation import task_created

STEERING = [
    *("X-SMTPAPI", "x-smtpapi", "X-MSYS-API", "Apparently-To", "X-Receiver", "X-Envelope-To"),
    *("X-MC-Subaccount", "X-MC-BccAddress", "x-mc-anything", "X-Mailgun-Variables", "X-Mailgun-Tag"),
    *("X-SES-CONFIGURATION-SET", "X-SES-SOURCE-ARN", "X-PM-Message-Stream", "X-PM-Bounce-Type", "X-PM-Tag"),
    *("X-xsMailingId", "X-TM-TEMPLATE", "X-MT-Category", "X-SMTPeter-Tags", "X-ElasticEmail-Settings"),
    *("X-MJ-CustomID", "X-Mailin-Tag", "X-MS-Exchange-Organization-SCL"),
]


def created(allowed: Container[str] = (), **headers: str) -> events_pb2.TaskCreated:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = TaskData(email="a@shop.test", subject="s", body="b", headers=names)
    return task_created(CreateRequest(data=data), "t", "", 1000, 0, allowed_headers=allowed)


@pytest.mark.parametrize("name", STEERING)
def test_a_field_that_steers_a_relay_is_refused_unless_it_is_allowed_by_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="steer a relay"):
        created(**{name: "x"})
    with pytest.raises(InvalidArgument, match="steer a relay"):
        created({f"{name.lower()}-other", "x-pm-other"}, **{name: "x"})
    assert created({name.lower()}, **{name: "x"}).task.headers[name] == "x"


@pytest.mark.parametrize("name", ["X-Campaign", "X-SMTP", "X-PMX", "X-Mailer", "X-Priority", "X-Sender-Id"])
def test_other_fields_pass(name: str) -> None:
    assert created(**{name: "1"}).task.headers[name] == "1"


@pytest.mark.parametrize("name", ["Bcc", "Resent-To", "From"])
def test_a_reserved_field_is_never_allowed(name: str) -> None:
    with pytest.raises(InvalidArgument):
        created({name.lower()}, **{name: "b@shop.test"})
