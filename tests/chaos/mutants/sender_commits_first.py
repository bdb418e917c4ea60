"""A sender that commits what it was handed, not what it has finished: a kill loses what was in its hands."""

from __future__ import annotations

import runpy

from services.common.stage.offsets import Offsets

__all__: list[str] = []


def _position(self: Offsets) -> int | None:
    return self._next


if __name__ == "__main__":
    Offsets.position = _position  # type: ignore[method-assign]
    runpy.run_module("services.sender", run_name="__main__")
