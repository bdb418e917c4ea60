"""The requirements that `make setup` takes from the lock."""

from __future__ import annotations

import pytest

from deploy.local.commands import SetupError
from deploy.local.setup import _pinned


def test_a_pinned_requirement_has_its_hashes_and_nothing_else() -> None:
    first, *hashes = _pinned("uv").splitlines()
    assert first.startswith("uv==")
    assert hashes
    assert all(line.strip().startswith("--hash=sha256:") for line in hashes)


def test_a_package_that_the_lock_does_not_pin_is_refused() -> None:
    with pytest.raises(SetupError, match="does not pin uvl"):
        _pinned("uvl")
