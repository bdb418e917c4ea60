"""An invalid setting stops a process at its start. The error names the variable and the accepted form."""

import asyncio
import importlib
import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from services.common.config import (
    Settings,
    file_secrets,
    refusals,
    secret_variables,
    settings,
    variable,
    variables,
)
from services.common.environment import OTHERS, misspelt
from services.common.stages import all_topics
from tests import forked

DAY = 86400

# Values of the right type that would fail later: at the first 4xx reply, mail, query or revocation.
BAD = [
    ("POSTROAD_SENDER_DELAYS", "", "at least 1 item"),
    ("POSTROAD_SENDER_DELAYS", " ", "at least 1 item"),
    *(
        (name, value, says)
        for name in ("POSTROAD_SENDER_DELAYS", "POSTROAD_VALIDATOR_DELAYS")
        for value, says in [
            (",", "whole seconds, comma separated"),
            ("60,", "whole seconds, comma separated"),
            ("60,,300", "whole seconds, comma separated"),
            ("1.5", "whole seconds, comma separated"),
            ("-1", "whole seconds, comma separated"),
            ("9" * 5000, "whole seconds, comma separated"),
            ("0,60", "from 1 to 2592000 seconds"),
            ("60,60", "each longer than the one before"),
            ("300,60", "each longer than the one before"),
            (str(30 * DAY + 1), "from 1 to 2592000 seconds"),
        ]
    ),
    *(
        (name, value, "")
        for name in (
            "POSTROAD_REVOKE_SECONDS",
            "POSTROAD_DRAIN_SECONDS",
            "POSTROAD_HANDOVER_SECONDS",
            "POSTROAD_DNS_TIMEOUT",
            "POSTROAD_LEASE_SECONDS",
        )
        for value in ("", "soon", "0", "-1", "nan", "inf", "-inf", "1e300", "3601")
    ),
    ("POSTROAD_LEASE_SECONDS", "1", "greater than 1"),
    ("POSTROAD_HANDOVER_SECONDS", "20", "greater than 20"),
    *(("POSTROAD_DOMAIN_RATE", value, "") for value in ("-1", "nan", "inf", "5e-324", "0.00001")),
    *(
        (name, value, "host:port")
        for name in ("POSTROAD_LISTEN", "POSTROAD_HTTP_LISTEN")
        for value in ("", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:x", "::1:8", "a b:1")
    ),
    *(
        ("POSTROAD_KAFKA_BOOTSTRAP", value, "host:port, comma separated")
        for value in ("", ",", "a:9092,", "a:0", "a:70000", "a:x", "a b:9092", "[a]:9092")
    ),
    ("POSTROAD_KAFKA_SECURITY_PROTOCOL", "TLS", "'SASL_SSL'"),
    ("POSTROAD_KAFKA_SASL_MECHANISM", "GSSAPI", "'SCRAM-SHA-512'"),
    *(
        (f"POSTROAD_KAFKA_{name}", value, f"POSTROAD_KAFKA_{name}: must be empty where")
        for name, value in [
            ("SASL_USERNAME", "api"),
            ("SASL_PASSWORD", "s3cret"),
            ("SSL_CA", os.devnull),
            ("SSL_CERT", os.devnull),
            ("SSL_KEY", os.devnull),
            ("SSL_KEY_PASSWORD", "s3cret"),
        ]
    ),
    *(
        (f"POSTROAD_KAFKA_{name}", "/nowhere", "cannot be read: No such file or directory")
        for name in ("SSL_CA", "SSL_CERT", "SSL_KEY")
    ),
    *(("POSTROAD_TOPIC_PREFIX", value, "at most 200") for value in ("a b", "a/", "ü.", "x" * 201)),
    ("POSTROAD_REPLICA", "x" * 201, "at most 200"),
    *(("POSTROAD_PARTITIONS", value, "") for value in ("", "0", "-1", "1.5", "100001")),
    *(("POSTROAD_REPLICATION", value, "") for value in ("0", "10001")),
    *(
        (name, "0", "greater than or equal to 1")
        for name in (
            "POSTROAD_MAX_IN_FLIGHT",
            "POSTROAD_MAX_IN_FLIGHT_BYTES",
            "POSTROAD_MAX_BODY",
            "POSTROAD_MAX_PENDING_CREATES",
            "POSTROAD_SENDER_SESSIONS",
        )
    ),
    ("POSTROAD_DOMAIN_CONCURRENCY", "-1", "greater than or equal to 0"),
    ("POSTROAD_MAX_BODY", str((2 << 20) + 1), "less than or equal to 2097152"),
    *(
        (name, value, "")
        for name in ("POSTROAD_BODY_RETENTION", "POSTROAD_SENDER_MAX_AGE")
        for value in ("-1", "1e9999", str(10**30))
    ),
    *(("POSTROAD_MAX_RESENDS", value, "") for value in ("", "-1", "1.5", "1001")),
    ("POSTROAD_ON_UNCERTAIN", "retry", "'resend' or 'hold'"),
    ("POSTROAD_GROUP_PROTOCOL", "", "'consumer' or 'classic'"),
    ("POSTROAD_LOG_FORMAT", "text", "'json' or 'console'"),
    ("POSTROAD_LOG_LEVEL", "INFO", "'info'"),
    *(("EMAIL_HOST", value, "without a port") for value in ("", " ", "relay:25", "[::1]", "a b", "https://relay")),
    *(
        (name, value, "boolean")
        for name in ("POSTROAD_INSECURE", "POSTROAD_ACCEPT_COMPRESSION")
        for value in ("", "perhaps", "2")
    ),
    *(("POSTROAD_ALLOWED_HEADERS", value, "X-PM-Tag") for value in (",", "Bcc", "X-PM-Tag,", "X-Mine")),
    *(("POSTROAD_OPERATOR_TOKEN", value, "16 or more") for value in ("short", "é" * 16, "a b" * 6)),
    *(("EMAIL_PORT", value, "") for value in ("", "0", "-1", "65536", "smtp")),
    ("EMAIL_TLS", "yes", "'starttls'"),
    *(
        ("EMAIL_HELO", value, "a full host name such as mail.example.org, or [192.0.2.1]")
        for value in (" ", "mail", "a b.example", "mail.example.org.", "192.0.2.1", "::1",
                      "[mail.example.org]", "[IPv6:192.0.2.1]", "[::1]", "ü.example",
                      "localhost.localdomain", "a.b\r\nRSET")
    ),
    *(("EMAIL_AUTH", value, "'auto', 'plain', 'login' or 'xoauth2'") for value in ("", "none", "cram-md5")),
    *(
        ("EMAIL_OAUTH_TOKEN_URL", value, "a URL such as https://")
        for value in ("login.example.org", "http://login.example.org/token", "https://", "https:///token",
                      "https://a b/", "https://login.example.org:x/", "https://[::1/", "ftp://localhost/")
    ),
    *(
        (name, os.fsdecode(b"\xff"), "UTF-8")
        for name in ("EMAIL_OAUTH_CLIENT_ID", "EMAIL_OAUTH_CLIENT_SECRET", "EMAIL_OAUTH_CLIENT_SECRET_FILE",
                     "EMAIL_OAUTH_SCOPE")
    ),
    *(("POSTROAD_REFLECTION", value, "'loopback', 'always' or 'never'") for value in ("", "1", "on")),
    ("EMAIL_USER", os.fsdecode(b"\xff"), "UTF-8"),
    ("EMAIL_PASS", os.fsdecode(b"\xff"), "UTF-8"),
]  # fmt: skip

# Values that only the part that reads the setting can check, when it is built.
BAD_FOR_ITS_READER = [
    *(("api", "POSTROAD_API_TOKENS", value) for value in ("", ",", " ", "shop", "shop:short", "a:12345678,")),
    *(
        ("api", "POSTROAD_TOKEN_KEYS", value)
        for value in (",", "short", "s3cret" * 6 + ",short", "k" * 32 + ",")
    ),
    *(("api", "POSTROAD_LISTEN", value) for value in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "api.example:0")),
    *(("api", "POSTROAD_TOKENS_FILE", value) for value in ("", "/nowhere", "/dev/null", __file__)),
    *(("api", f"POSTROAD_TLS_{name}", "") for name in ("CERT", "KEY", "CLIENT_CA")),
    *(("api", f"POSTROAD_TLS_{name}", "/nowhere") for name in ("CERT", "KEY", "CLIENT_CA")),
    *(
        (service, "POSTROAD_DATABASE_URL", value)
        for service in ("api", "sender", "status")
        for value in (
            "",
            "nonsense",
            "sqlite:///x",
            "mysql://u:s3cret@h:abc/x",
            "mysql://u:s3cret@h:70000/x",
            "mysql://u:s3cret@h",
            "mysql://u:s3cret@h/x?colation=utf8mb4_bin",
        )
    ),
    *(("validator", "POSTROAD_DNS_SERVERS", value) for value in (",", "127.0.0.1:0", "127.0.0.1:x", "a..b")),
    *(
        ("sender", "EMAIL_FROM", value)
        for value in (
            "",
            "Postroad",
            "Postroad <postroad>",
            "a@b.test, c@d.test",
            "Post\nage <a@b.test>",
            "Shop, Inc. <a@b.test>",
            '"=?UTF-8?Q?x?=" <a@b.test>',
            "a b@c.test",
            "x" * 65 + "@b.test",
            "a@" + "b" * 254,
        )
    ),
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("POSTROAD_", "EMAIL_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("name", "value", "says"), BAD, ids=lambda part: ascii(part)[:40])
def test_a_value_that_would_fail_later_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (line,) = set(refusals(caught.value))
    assert line.startswith(f"{name}: ")
    assert says in line
    assert "Value error" not in line


@pytest.mark.parametrize(("service", "name", "value"), BAD_FOR_ITS_READER, ids=lambda part: ascii(part)[:40])
def test_its_reader_refuses_a_value_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, service: str, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    build = importlib.import_module(f"services.{service}.service").build

    async def start() -> None:
        await build(Settings())

    with pytest.raises(ValueError, match=f"^{name}: ") as caught:
        asyncio.run(start())
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTROAD_LISTEN", "[::]:50051"),
        ("POSTROAD_HTTP_LISTEN", "localhost:0"),
        ("POSTROAD_KAFKA_BOOTSTRAP", "kafka, kafka_2:9092,[::1]:9092,10.0.0.1:9092"),
        ("POSTROAD_KAFKA_SECURITY_PROTOCOL", "ssl"),
        ("POSTROAD_KAFKA_SASL_MECHANISM", "scram-sha-256"),
        ("POSTROAD_ALLOWED_HEADERS", ""),
        ("POSTROAD_ALLOWED_HEADERS", "X-PM-Tag, x-mc-tags"),
        ("EMAIL_HOST", "::1"),
        ("EMAIL_HOST", "relay.example."),
        ("POSTROAD_SENDER_DELAYS", " 60, 300 "),
        ("POSTROAD_SENDER_DELAYS", str(30 * DAY)),
        ("POSTROAD_DOMAIN_RATE", "0.0001"),
        ("EMAIL_HELO", "Mail-1.example.org"),
        ("EMAIL_HELO", "[192.0.2.1]"),
        ("EMAIL_HELO", "[IPv6:2001:db8::1]"),
        ("EMAIL_AUTH", "LOGIN"),
        ("EMAIL_AUTH", "XOAuth2"),
        ("EMAIL_OAUTH_TOKEN_URL", "https://login.example.org/tenant/token?a=b"),
        ("EMAIL_OAUTH_TOKEN_URL", "http://127.0.0.1:8080/token"),
        ("EMAIL_OAUTH_TOKEN_URL", "http://[::1]/token"),
    ],
)
def test_a_valid_value_is_accepted(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    Settings()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_a_secret_loses_only_the_line_end_at_its_end(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    secrets = ("EMAIL_PASS", "EMAIL_OAUTH_CLIENT_SECRET", "POSTROAD_API_TOKENS", "POSTROAD_DATABASE_URL")
    for name in secrets:
        monkeypatch.setenv(name, f" a\nb {end}")
    settings = Settings()
    assert settings.email_pass.get_secret_value() == settings.database_url.get_secret_value() == " a\nb "
    assert settings.email_oauth_client_secret.get_secret_value() == " a\nb "
    assert settings.api_tokens.get_secret_value() == " a\nb "


def test_the_validator_may_have_no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTROAD_VALIDATOR_DELAYS", "")
    assert Settings().validator_delays == ()


def test_every_setting_refuses_some_values() -> None:
    tried = {name for name, _, _ in BAD} | {name for _, name, _ in BAD_FOR_ITS_READER}
    assert {variable(field) for field in Settings.model_fields} <= tried


@pytest.mark.parametrize(
    ("service", "given", "says"),
    [
        ("sender", {"POSTROAD_SENDER_DELAYS": ""}, "POSTROAD_SENDER_DELAYS: "),
        ("status", {"POSTROAD_DATABASE_URL": "nonsense"}, "POSTROAD_DATABASE_URL: "),
        ("status", {"POSTROAD_DATABASE_URL_FILE": "/nowhere"}, "POSTROAD_DATABASE_URL_FILE: cannot be read"),
        (
            "validator",
            {"POSTROAD_VALIDATOR_DELAY": "5"},
            "POSTROAD_VALIDATOR_DELAY: no such variable; the nearest is POSTROAD_VALIDATOR_DELAYS",
        ),
    ],
)
def test_a_process_with_an_invalid_setting_exits_with_2(
    service: str, given: dict[str, str], says: str
) -> None:
    code, _, err = forked.run(f"services.{service}", (), dict(os.environ) | given, seconds=60)
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith(says)


SECRETS = secret_variables()


def test_every_secret_but_that_of_oauth_may_be_in_a_file() -> None:
    secrets = {
        variable(name) for name, field in Settings.model_fields.items() if field.annotation is SecretStr
    }
    assert secrets - set(SECRETS) == {"EMAIL_OAUTH_CLIENT_SECRET"}
    assert {f"{name}_FILE" for name in SECRETS} <= set(variables())


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_comes_from_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, end: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(f"s3cret-s3cret-s3cret {end}".replace(" ", "-").encode())
    monkeypatch.setenv(f"{name}_FILE", str(file))
    monkeypatch.setenv(name, "")
    if name == "POSTROAD_KAFKA_SASL_PASSWORD":
        monkeypatch.setenv("POSTROAD_KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
        monkeypatch.setenv("POSTROAD_KAFKA_SASL_USERNAME", "api")
    elif name == "POSTROAD_KAFKA_SSL_KEY_PASSWORD":
        monkeypatch.setenv("POSTROAD_KAFKA_SECURITY_PROTOCOL", "SSL")
    read = settings.__wrapped__()
    assert {
        variable(field): getattr(read, field).get_secret_value()
        for field in read.model_fields_set
        if variable(field) in SECRETS
    } == {name: "s3cret-s3cret-s3cret-"}
    assert "s3cret" not in repr(read) + str(read) + str(read.model_dump())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "the file is empty"),
        (b"\n", "the file is empty"),
        (b"s3cret\xff", "cannot be read: it is not UTF-8"),
    ],
)
def test_an_unusable_file_of_a_secret_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^EMAIL_PASS_FILE: {says}$"):
        file_secrets({"EMAIL_PASS_FILE": str(file)})


def test_a_secret_and_its_file_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    given = {"email_pass_file": str(tmp_path / "secret"), "EMAIL_PASS": "s3cret"}
    with pytest.raises(
        ValueError, match=r"^EMAIL_PASS: is given, and so is EMAIL_PASS_FILE; unset one of them$"
    ):
        file_secrets(given)


def test_the_longest_names_and_delays_fit_a_topic() -> None:
    settings = Settings(sender_delays=(30 * DAY,), topic_prefix="x" * 200)
    topics = all_topics(settings)
    assert max(len(topic.name) for topic in topics) <= 249
    (delay,) = (topic for topic in topics if topic.name.endswith(str(30 * DAY)))
    assert int(delay.config["retention.ms"]) >= 2 * 30 * DAY * 1000


def test_an_unknown_variable_is_named_with_the_nearest_one() -> None:
    assert misspelt(["POSTROAD_PARTITONS", "POSTROAD_ZZZ", "postroad_api_token"]) == [
        "POSTROAD_PARTITONS: no such variable; the nearest is POSTROAD_PARTITIONS",
        "POSTROAD_ZZZ: no such variable",
        "postroad_api_token: no such variable; the nearest is POSTROAD_API_TOKENS",
    ]
    # The variables of the relay have another prefix.
    assert len(misspelt(["POSTROAD_EMAIL_HOST", "POSTROAD_HTTP_SENDER", "POSTROAD_LOCAL_PATH"])) == 3
    assert len(misspelt(["POSTROAD_HTTP_SENDR_1", "POSTROAD_HTTP_LISTEN_1", "POSTROAD_HTTP_SENDER_0"])) == 3


def test_variables_that_are_no_settings_are_known() -> None:
    ours = ["POSTROAD_HTTP_SENDER_12", "postroad_partitions", "EMAIL_ME", "PATH", "_POSTROAD_COMPLETE"]
    assert misspelt([*variables(), *OTHERS, *ours]) == []


def test_the_known_variables_are_those_that_the_tree_names() -> None:
    root = Path(__file__).parents[2]
    tried = {"environment.py", "test_settings.py", "test_cli_settings.py"}
    files = [
        path
        for folder in ("services", "deploy", "tests")
        for path in (root / folder).rglob("*.py")
        if path.name not in tried or path.parent.name == "local"
    ]
    text = "".join(path.read_text() for path in (*files, root / "compose.yaml", root / "Makefile"))
    named = set(re.findall(r"(?<![A-Z_])POSTROAD_[A-Z0-9_]*[A-Z0-9](?![A-Z0-9_])", text))
    settings = set(variables())
    assert named - settings - OTHERS - {f"POSTROAD_HTTP_SENDER_{n}" for n in range(1, 4)} == set()
    assert named >= OTHERS
    assert not OTHERS & settings


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"protocol": "SASL_SSL", "username": "api"}, "SASL_PASSWORD: must be set"),
        ({"protocol": "SSL", "username": "api"}, "SASL_USERNAME: must be empty"),
        ({"protocol": "SSL", "cert": os.devnull}, "SSL_KEY: must be set"),
        ({"protocol": "SASL_PLAINTEXT", "username": "a", "password": "s3cret", "ca": os.devnull}, "SSL_CA: "),
    ],
)
def test_the_settings_of_kafkas_security_must_agree(given: dict[str, str], says: str) -> None:
    fields = {"protocol": "kafka_security_protocol", "username": "kafka_sasl_username", "ca": "kafka_ssl_ca"}
    fields |= {"password": "kafka_sasl_password", "cert": "kafka_ssl_cert"}
    with pytest.raises(ValidationError) as caught:
        Settings(**{fields[name]: value for name, value in given.items()})  # type: ignore[arg-type]
    (line,) = refusals(caught.value)
    assert line.startswith(f"POSTROAD_KAFKA_{says}")
    assert "s3cret" not in line


def test_the_text_of_the_settings_shows_no_secret() -> None:
    given = {
        "database_url": "mysql://ann:s3cret@db/postroad",
        "email_pass": "s3cret",
        "email_oauth_client_secret": "s3cret",
        "api_tokens": "shop:s3cret-one",
        "token_keys": "s3cret" * 6,
        "operator_token": "s3cret" * 6,
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_username": "api",
        "kafka_sasl_password": "s3cret",
        "kafka_ssl_key_password": "s3cret",
    }
    assert "s3cret" not in repr(Settings(**given))  # type: ignore[arg-type]
