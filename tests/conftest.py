"""The fixtures that any test may ask for, and the end of all that a run started."""

from tests.reaper import pytest_configure, pytest_unconfigure
from tests.stack import infra, new_stack, stack

__all__ = ["infra", "new_stack", "pytest_configure", "pytest_unconfigure", "stack"]
