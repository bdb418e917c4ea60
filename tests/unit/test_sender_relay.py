"""The relay of the settings: the name in EHLO, AUTH, and missing settings."""

import socket
from pathlib import Path
from typing import Any

import pytest

from services.common.config import Settings
from services.sender import client_name
from services.sender.client_name import find_client_name
from services.sender.metrics import SENDER_RELAY_TROUBLE
from services.sender.replies import NotSent, Phase
from services.sender.service import _export_trouble, build, make_relay, make_tokens

OAUTH = {
    "email_user": "shop@example.org",
    "email_auth": "xoauth2",
    "email_oauth_token_url": "https://login.example.org/token",
    "email_oauth_client_id": "client-1",
    "email_oauth_client_secret": "s3cret",
}


def settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.mark.parametrize(
    ("hostname", "fqdn", "name"),
    [
        ("mail-1.example.org", None, "mail-1.example.org"),
        ("mail-1", "mail-1.example.org.", "mail-1.example.org"),
        ("3f2a1b9c8d7e", "3f2a1b9c8d7e", None),
        ("box", "localhost", None),
        ("box", "localhost.localdomain", None),
        ("box", "192.0.2.1", None),
        ("under_score.example.org", None, None),
    ],
)
async def test_the_client_has_the_hosts_full_name_or_else_its_address(
    monkeypatch: pytest.MonkeyPatch, hostname: str, fqdn: str | None, name: str | None
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    monkeypatch.setattr(socket, "getfqdn", lambda asked: fqdn)
    assert await find_client_name() == name


async def test_a_resolver_that_does_not_answer_delays_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise OSError("no DNS")

    monkeypatch.setattr(client_name, "_fqdn", fails)
    assert await find_client_name() is None


def test_the_settings_client_name_comes_before_the_hosts() -> None:
    assert (
        make_relay(settings(email_helo="mail.example.org"), None, "host.example").client_name
        == "mail.example.org"
    )
    assert make_relay(settings(), None, "host.example").client_name == "host.example"
    assert make_relay(settings()).client_name is None


def test_auth_is_made_as_the_setting_says() -> None:
    assert make_relay(settings()).credentials is None
    for auth, mechanism in (("auto", None), ("plain", "plain"), ("LOGIN", "login")):
        credentials = make_relay(settings(email_user="ann", email_pass="pw", email_auth=auth)).credentials
        assert credentials is not None
        assert (credentials.user, credentials.secret, credentials.mechanism) == ("ann", "pw", mechanism)
        assert credentials.tokens is None
    given = settings(**OAUTH)
    tokens = make_tokens(given)
    assert tokens is not None
    credentials = make_relay(given, tokens).credentials
    assert credentials is not None
    assert (credentials.mechanism, credentials.tokens) == ("xoauth2", tokens)
    assert "s3cret" not in f"{credentials} {given!r}"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"email_auth": "plain"}, "^EMAIL_USER: must be set where EMAIL_AUTH is plain"),
        (OAUTH | {"email_user": ""}, "^EMAIL_USER: must be set where EMAIL_AUTH is xoauth2"),
        (OAUTH | {"email_oauth_token_url": ""}, "^EMAIL_OAUTH_TOKEN_URL: must be set"),
        (OAUTH | {"email_oauth_client_id": ""}, "^EMAIL_OAUTH_CLIENT_ID: must be set"),
        (OAUTH | {"email_oauth_client_secret": "\n"}, "^EMAIL_OAUTH_CLIENT_SECRET: must be set"),
        (OAUTH | {"email_oauth_client_secret_file": "/x"}, "^EMAIL_OAUTH_CLIENT_SECRET: .* not both"),
        (
            OAUTH | {"email_oauth_client_secret": "", "email_oauth_client_secret_file": "/no/such/file"},
            "^EMAIL_OAUTH_CLIENT_SECRET_FILE: cannot be read",
        ),
        (OAUTH | {"email_auth": "auto"}, "^EMAIL_AUTH: must be xoauth2"),
        *(
            (
                {"email_user": "ann", "email_auth": auth, name: "s3cret"},
                f"^EMAIL_AUTH: .* {name.upper()} is set",
            )
            for auth in ("auto", "plain")
            for name in (
                "email_oauth_client_id",
                "email_oauth_client_secret",
                "email_oauth_client_secret_file",
                "email_oauth_scope",
            )
        ),
        ({"email_pass": "s3cret"}, "^EMAIL_USER: must be set where EMAIL_PASS is"),
        (OAUTH | {"email_pass": "s3cret"}, "^EMAIL_PASS: must be empty where EMAIL_AUTH is xoauth2"),
    ],
)
def test_a_missing_or_superfluous_setting_is_named(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        make_relay(settings(**given), make_tokens(settings(**given)))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", ["", "\n"])
def test_an_empty_variable_counts_as_not_set(value: str) -> None:
    names = (*(name for name in OAUTH if name.startswith("email_oauth")), "email_oauth_scope", "email_pass")
    given = settings(**{name: "" if name.endswith(("url", "id", "scope")) else value for name in names})
    assert make_tokens(given) is None
    assert make_relay(given).credentials is None


def test_the_secrets_file_is_read_at_each_fetch_without_its_line_end(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("first\r\n")
    given = OAUTH | {"email_oauth_client_secret": "", "email_oauth_client_secret_file": str(file)}
    tokens = make_tokens(settings(**given))
    assert tokens is not None
    assert tokens._secret() == "first"
    file.write_text("second\n")
    assert tokens._secret() == "second"
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"^EMAIL_OAUTH_CLIENT_SECRET_FILE: the file is empty"):
        make_tokens(settings(**given))


def test_the_relays_trouble_is_one_series_while_it_lasts() -> None:
    def series() -> list[dict[str, str]]:
        return [sample.labels for metric in SENDER_RELAY_TROUBLE.collect() for sample in metric.samples]

    for reply in ("550 5.4.5 quota id-1", "550 5.4.5 quota id-2"):
        _export_trouble(NotSent(Phase.ENVELOPE, reply, True, "relay:25"))
        assert series() == [{"relay": "relay:25", "phase": "envelope", "reply": reply}]
    _export_trouble(None)
    assert series() == []


@pytest.mark.parametrize(("sessions", "a_domain"), [(20, 15), (10, 7)])
async def test_no_domain_gets_all_of_a_sender(sessions: int, a_domain: int) -> None:
    service = await build(settings(sender_sessions=sessions, email_helo="mail.example.org"))
    session_slots, claim_slots = (
        service._sender._attempts.session_slots,
        service._sender._attempts.claim_slots,
    )
    assert (session_slots._free, session_slots._per_domain) == (sessions, a_domain)
    assert (claim_slots._free, claim_slots._per_domain) == (4 * sessions, 4 * a_domain)


async def test_trouble_with_the_token_and_with_the_relay_is_on_readyz() -> None:
    service = await build(settings(**OAUTH, email_host="relay.example", email_helo="mail.example.org"))
    assert service._tokens is not None
    assert service._pool.relay.client_name == "mail.example.org"
    service._tokens.trouble = "401 invalid_client"
    service._pool._availability.trouble = NotSent(Phase.ENVELOPE, "550 5.4.5 quota", True, "relay.example:25")
    problems = service.problems()
    assert "OAuth token: 401 invalid_client" in problems
    assert "relay relay.example:25: envelope: 550 5.4.5 quota" in problems
