"""Where a command's connections come from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError

from postroad.v1.task_service_pb2 import CountRequest
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.cli.channel import open_channel
from services.cli.errors import USAGE, Failure
from services.cli.settings import effective_variables, make_settings, with_token
from services.common.operations.tokens import add_token
from tests.access_server import serve
from tests.certificates import make_certificates

CONFIG = """
default-profile = "near"

[profiles.near]
api = "near:1"

[profiles.far]
api = "far:1"
kafka = "far:9092"
token = "secret-of-far"
tls = true
partitions = 24
sender-delays = [60, 300]
email_host = "relay.far"
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return str(path)


def test_a_flag_beats_the_environment_beats_the_env_file_beats_the_profile(
    config: str, tmp_path: Path
) -> None:
    env_file = tmp_path / "stack.env"
    env_file.write_text("# the stack\n\nPOSTROAD_API=file:1\nexport POSTROAD_KAFKA_BOOTSTRAP='file:9092'\n")
    given: dict[str, str | None] = {"config": config, "profile": "far"}
    assert effective_variables(given, {})["POSTROAD_API"] == "far:1"
    given["env-file"] = str(env_file)
    assert effective_variables(given, {})["POSTROAD_API"] == "file:1"
    assert effective_variables(given, {})["POSTROAD_KAFKA_BOOTSTRAP"] == "file:9092"
    assert effective_variables(given, {"POSTROAD_API": "environment:1"})["POSTROAD_API"] == "environment:1"
    given["api"] = "flag:1"
    found = effective_variables(given, {"POSTROAD_API": "environment:1"})
    assert found["POSTROAD_API"] == "flag:1"
    assert found["POSTROAD_TOKEN"] == "secret-of-far"


def test_profiles_are_named_by_flag_variable_or_the_file_itself(config: str) -> None:
    assert effective_variables({"config": config}, {})["POSTROAD_API"] == "near:1"
    assert (
        effective_variables({}, {"POSTROAD_CONFIG": config, "POSTROAD_PROFILE": "far"})["POSTROAD_API"]
        == "far:1"
    )
    named: dict[str, str | None] = {"config": config, "profile": "near"}
    assert effective_variables(named, {"POSTROAD_PROFILE": "far"})["POSTROAD_API"] == "near:1"


def test_the_config_file_is_in_the_xdg_directory(tmp_path: Path) -> None:
    (tmp_path / "postroad").mkdir()
    (tmp_path / "postroad/config.toml").write_text('[profiles.x]\napi = "x:1"')
    found = effective_variables({"profile": "x"}, {"XDG_CONFIG_HOME": str(tmp_path)})
    assert found["POSTROAD_API"] == "x:1"
    assert "POSTROAD_API" not in effective_variables({}, {"XDG_CONFIG_HOME": str(tmp_path / "empty")})


def test_a_profile_sets_any_setting(config: str) -> None:
    settings = make_settings(effective_variables({"config": config, "profile": "far"}, {}))
    assert (settings.kafka_bootstrap, settings.partitions) == ("far:9092", 24)
    assert (settings.sender_delays, settings.email_host) == ((60, 300), "relay.far")


def test_a_given_setting_differs_from_a_default(config: str) -> None:
    assert "body_retention" not in make_settings(effective_variables({"config": config}, {})).model_fields_set
    given = make_settings(effective_variables({"config": config}, {"POSTROAD_BODY_RETENTION": "2592000"}))
    assert "body_retention" in given.model_fields_set


def test_a_bad_value_names_its_variable() -> None:
    with pytest.raises(ValidationError):
        make_settings({"POSTROAD_PARTITIONS": "many"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[profiles.x]\nkafak = 'a'", "profile 'x': unknown key 'kafak'"),
        ("[profiles.x]\napi = {a = 1}", "profile 'x': api is neither text, number nor true or false"),
        ("profiles = 3", "no profile 'x' in the config file; it has: none"),
        ("[profiles.y]\n[profiles.z]", "no profile 'x' in the config file; it has: y, z"),
        ("[profiles", "config.toml: "),
    ],
)
def test_an_error_in_the_config_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(Failure) as failed:
        effective_variables({"config": str(path), "profile": "x"}, {})
    assert says in failed.value.line
    assert failed.value.code == USAGE


@pytest.mark.parametrize("value", ['["near"]', "3", "{}"])
def test_a_default_profile_is_a_name(tmp_path: Path, value: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"default-profile = {value}\n[profiles.near]\n")
    with pytest.raises(Failure, match="no profile's name") as failed:
        effective_variables({"config": str(path)}, {})
    assert failed.value.code == USAGE


@pytest.mark.parametrize("name", ["config", "env-file"])
def test_a_named_file_must_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(Failure, match="nowhere"):
        effective_variables({name: str(tmp_path / "nowhere")}, {})


def test_an_env_file_has_names_and_values(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("POSTROAD_API=a:1\nnonsense\n")
    with pytest.raises(Failure, match="line 2: no NAME=value"):
        effective_variables({"env-file": str(path)}, {})


def test_an_unknown_variable_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("POSTROAD_KAFKA_BOOTSTRP=a:1\n")
    nearest = "POSTROAD_KAFKA_BOOTSTRP: no such variable; the nearest is POSTROAD_KAFKA_BOOTSTRAP"
    for given, environment in (({"env-file": str(path)}, {}), ({}, {"POSTROAD_KAFKA_BOOTSTRP": "a:1"})):
        with pytest.raises(Failure) as failed:
            effective_variables(given, environment)
        assert (failed.value.line, failed.value.code) == (nearest, USAGE)
    assert effective_variables({}, {"POSTROAD_HTTP_API_1": "127.0.0.1:1", "POSTROAD_PARTITIONS": "3"})


def test_a_line_end_is_no_part_of_a_token() -> None:
    open_channel({"POSTROAD_TOKEN": "secret-of-near\r\n"}).close()
    with pytest.raises(Failure, match="visible ASCII"):
        open_channel({"POSTROAD_TOKEN": "secret\nof-near"})


def test_a_token_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-of-file\n")
    path = str(tmp_path / "token")
    assert with_token({"POSTROAD_TOKEN_FILE": path})["POSTROAD_TOKEN"] == "secret-of-file"
    assert with_token({"POSTROAD_API": "near:1"}) == {"POSTROAD_API": "near:1"}
    for wrong in ({"POSTROAD_TOKEN_FILE": path, "POSTROAD_TOKEN": "x"}, {"POSTROAD_TOKEN_FILE": "/nowhere"}):
        with pytest.raises(Failure, match="POSTROAD_TOKEN_FILE") as failed:
            with_token(wrong)
        assert failed.value.code == USAGE


def test_a_secret_and_its_file_replace_each_other(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[profiles.a]\ntoken-file = "/a"\ndatabase = "mysql://u:p@h/x"\n')
    given: dict[str, str | None] = {"config": str(config), "profile": "a"}
    assert effective_variables(given, {})["POSTROAD_TOKEN_FILE"] == "/a"
    found = effective_variables(given, {"POSTROAD_TOKEN": "b", "POSTROAD_DATABASE_URL_FILE": "/b"})
    assert found == {"POSTROAD_TOKEN": "b", "POSTROAD_DATABASE_URL_FILE": "/b"}
    found = effective_variables(given | {"token": "c"}, {"POSTROAD_TOKEN_FILE": "/b"})
    assert found["POSTROAD_TOKEN"] == "c"
    assert "POSTROAD_TOKEN_FILE" not in found


def test_the_settings_take_a_secret_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("mysql://u:p@h/x\n")
    made = make_settings({"POSTROAD_DATABASE_URL_FILE": str(tmp_path / "url")})
    assert made.database_url.get_secret_value() == "mysql://u:p@h/x"
    with pytest.raises(Failure, match="POSTROAD_DATABASE_URL_FILE: cannot be read") as failed:
        make_settings({"POSTROAD_DATABASE_URL_FILE": "/nowhere"})
    assert failed.value.code == USAGE


@pytest.mark.parametrize(
    ("text", "mode", "warned"),
    [
        ('[profiles.a]\ntoken = "hidden"\n', 0o644, True),
        ('[profiles.a]\ndatabase = "mysql://u:p@h/x"\n', 0o640, True),
        ('[profiles.a]\ntoken = "hidden"\n', 0o600, False),
        ('[profiles.a]\napi = "far:1"\n', 0o644, False),
        ('[profiles.a]\nemail_pass = "hidden"\n', 0o604, True),
        ('[profiles.a]\noperator-token = "hidden-hidden-hidden"\n', 0o604, True),
        ('[profiles.a]\ntoken-file = "/hidden"\n', 0o604, False),
    ],
)
def test_a_readable_config_file_with_secrets_gets_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, mode: int, warned: bool
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    path.chmod(mode)
    effective_variables({"config": str(path)}, {})
    printed = capsys.readouterr().err
    assert bool(printed) == warned
    assert "hidden" not in printed
    assert not warned or f"chmod 600 {path}" in printed


def test_a_readable_env_file_with_secrets_gets_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stack.env"
    path.write_text("POSTROAD_API=near:1\nPOSTROAD_TOKEN=secret\n")
    path.chmod(0o644)
    effective_variables({"env-file": str(path)}, {})
    assert f"chmod 600 {path}" in capsys.readouterr().err


def test_a_token_goes_off_this_host_only_by_tls_or_by_consent(tmp_path: Path) -> None:
    token = {"POSTROAD_TOKEN": "secret-of-far"}
    for api in ("far.example:50051", "192.0.2.1:50051", "[2001:db8::1]:50051"):
        with pytest.raises(Failure, match=r"in clear.*--tls.*--token-in-clear") as failed:
            open_channel(token | {"POSTROAD_API": api})
        assert failed.value.code == USAGE
        assert "secret" not in failed.value.line
        for more in ({"POSTROAD_TLS": "true"}, {"POSTROAD_TOKEN_IN_CLEAR": "1"}):
            open_channel(token | {"POSTROAD_API": api} | more).close()
        open_channel({"POSTROAD_API": api}).close()
    for api in ("127.0.0.1:50051", "localhost:50051", "[::1]:50051"):
        open_channel(token | {"POSTROAD_API": api}).close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"CA": "FILE", "TLS": "false"},
            "POSTROAD_CA (--ca) is for TLS, which POSTROAD_TLS (--no-tls) forbids",
        ),
        ({"CERT": "FILE"}, "POSTROAD_CERT (--cert) and POSTROAD_KEY (--key) need each other"),
        ({"KEY": "FILE"}, "POSTROAD_CERT (--cert) and POSTROAD_KEY (--key) need each other"),
        ({"CA": "/nowhere"}, "POSTROAD_CA (--ca): /nowhere: No such file or directory"),
        ({"CA": "/dev/null"}, "has nothing in PEM"),
        ({"TLS": "maybe"}, "POSTROAD_TLS (--tls) is 'maybe', neither true nor false"),
        ({"TOKEN_IN_CLEAR": "maybe"}, "POSTROAD_TOKEN_IN_CLEAR (--token-in-clear) is 'maybe', neither"),
        ({"TENANT": "../shop"}, "POSTROAD_TENANT (--tenant) is not 1 to 64 letters"),
    ],
)
def test_wrong_tls_settings_are_refused_before_a_call(
    tmp_path: Path, given: dict[str, str], says: str
) -> None:
    file = tmp_path / "some.pem"
    file.write_text("-----BEGIN CERTIFICATE-----\n")
    variables = {f"POSTROAD_{name}": value.replace("FILE", str(file)) for name, value in given.items()}
    with pytest.raises(Failure) as failed:
        open_channel(variables)
    assert says in failed.value.line
    assert failed.value.code == USAGE


async def test_a_channel_has_the_token_the_tenant_and_the_certificate(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path, "127.0.0.1", "postroad://tenant/shop")
    grant, token = add_token(tmp_path / "tokens", "ops", "read,operate", None)
    given = {"tls_cert": str(certificates.certificate), "tls_key": str(certificates.key)}
    given |= {"tls_client_ca": str(certificates.authority), "tokens_file": str(tmp_path / "tokens")}
    async with serve(**given) as served:

        def count(**variables: str) -> None:
            own = {"CA": certificates.authority, "CERT": certificates.certificate, "KEY": certificates.key}
            files = {f"POSTROAD_{name}": str(path) for name, path in own.items()}
            with open_channel({"POSTROAD_API": served.target} | files | variables) as channel:
                TaskServiceStub(channel).Count(CountRequest(), timeout=10)

        await asyncio.to_thread(count)
        await asyncio.to_thread(count, POSTROAD_TOKEN=token, POSTROAD_TENANT="bank")
    assert [(call.tenant, call.grant.tenant) for call in served.calls] == [("shop", "shop"), ("bank", "ops")]
    assert served.calls[1].grant == grant
