"""The database's URL: which ones are refused, and that no refusal shows the password."""

from __future__ import annotations

import pytest

from services.common.database.engine import url_of


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:pw@s3cret@127.0.0.1/db",
        "mysql://u:pw@s3cret/rest@127.0.0.1/db",
        "mysql://u:pw@s3cret/db?rest@127.0.0.1/db",
        "mysql://u:pw@s3cret/db?s3cret=rest@127.0.0.1/db",
        "mysql://u:pw@h:s3cret/db",
        "mysql//u:s3cret@h/db",
    ],
)
def test_a_password_with_a_special_character_is_no_host_and_is_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        url_of(url)
    assert "s3cret" not in str(caught.value)


def test_a_password_may_have_its_special_characters_percent_encoded() -> None:
    url = url_of("mysql://u:p%40s3cret%2F@127.0.0.1/db")
    assert (url.password, url.host) == ("p@s3cret/", "127.0.0.1")
