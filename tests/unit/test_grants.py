"""The tokens file: its lines, and what `postroad token` does with it."""

from __future__ import annotations

import hashlib
import math
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.common.grants import SCOPES, Grant, format_grant, parse_grants, token_digest
from services.common.operations.errors import InvalidOption, NotFound, OperationError
from services.common.operations.tokens import add_token, list_grants, revoke_token

DIGEST = "ab" * 32
LINE = f"laptop shop {DIGEST} create,read 2027-01-31T00:00:00Z"


def test_a_line_is_a_grant() -> None:
    text = f"# our tokens\n\n  {LINE}\nops\t-\n".replace("ops\t-\n", f"ops ops {'CD' * 32} operate -\r\n")
    laptop, ops = parse_grants(text)
    end = datetime(2027, 1, 31, tzinfo=UTC).timestamp()
    assert laptop == Grant("laptop", "shop", b"\xab" * 32, frozenset({"create", "read"}), end)
    assert ops == Grant("ops", "ops", b"\xcd" * 32, frozenset({"operate"}), math.inf)
    assert parse_grants("\n".join(map(format_grant, (laptop, ops)))) == [laptop, ops]
    assert format_grant(laptop) == LINE
    assert parse_grants("# none\n") == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("s3cret", "has 1 fields"),
        (f"{LINE} more", "has 6 fields"),
        (LINE.replace("laptop", "-laptop"), "the id is not 1 to 64"),
        (LINE.replace("shop", "sh/op"), "the tenant is not 1 to 64"),
        (LINE.replace(DIGEST, "s3cret-token"), "the SHA-256 is not 64 hexadecimal digits"),
        (LINE.replace(DIGEST, DIGEST[:-1]), "the SHA-256 is not 64 hexadecimal digits"),
        (LINE.replace("create", "write"), "the scopes are create, read, cancel, operate, content"),
        (LINE.replace("create,read", ","), "the scopes are create, read, cancel, operate, content"),
        (LINE.replace("2027-01-31T00:00:00Z", "2027-01-31"), "the end is neither"),
        (LINE.replace("2027-01-31T00:00:00Z", "never"), "the end is neither"),
        (f"{LINE}\n{LINE}", "the id laptop is there twice"),
        (f"{LINE}\n{LINE.replace('laptop', 'other')}", "the digest is there twice"),
    ],
)
def test_a_malformed_line_is_named_and_not_shown(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"line [12]: ") as caught:
        parse_grants(line)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_new_token_is_in_the_file_as_its_digest_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    end = datetime(2030, 1, 1, tzinfo=UTC)
    grant, token = add_token(path, "shop", "read,create", end)
    other, _ = add_token(path, "shop", ",".join(SCOPES), None)
    assert list_grants(path) == [grant, other]
    assert (grant.digest, grant.not_after) == (hashlib.sha256(token.encode()).digest(), end.timestamp())
    assert token not in path.read_text()
    # 32 random bytes, which are 256 bits.
    assert len(token.removeprefix("postroad_")) == 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["tokens"]


def test_a_revoked_token_leaves_the_other_lines_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# a remark on laptop\n{LINE}\nlap top {'cd' * 32}   read -")
    assert revoke_token(path, "laptop").tenant == "shop"
    assert path.read_text() == f"# a remark on laptop\nlap top {'cd' * 32}   read -"
    grant, _ = add_token(path, "shop", "read", None)
    assert [found.id for found in list_grants(path)] == ["lap", grant.id]
    with pytest.raises(NotFound, match="has no token laptop"):
        revoke_token(path, "laptop")


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "tokens"
    link.symlink_to(path)
    add_token(link, "shop", "read", None)
    assert link.is_symlink()
    assert len(list_grants(path)) == 1


def test_commands_at_the_same_time_lose_no_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    threads = [threading.Thread(target=add_token, args=(path, "shop", "read", None)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list_grants(path)) == 16


def test_a_malformed_file_is_changed_by_no_command(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("nonsense\n")
    for change in (lambda: add_token(path, "shop", "read", None), lambda: revoke_token(path, "nonsense")):
        with pytest.raises(OperationError, match="line 1: has 1 fields"):
            change()
    assert path.read_text() == "nonsense\n"
    for tenant, scopes in (("-", "read"), ("shop", "write")):
        with pytest.raises(InvalidOption):
            add_token(tmp_path / "new", tenant, scopes, None)
    assert not (tmp_path / "new").exists()


def test_the_digest_is_plain_sha_256() -> None:
    """So a token can be made elsewhere: `printf %s TOKEN | sha256sum`."""
    assert token_digest("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
