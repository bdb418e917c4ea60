"""The fixtures that any test may ask for."""

from tests.stack import infra, new_stack, stack

__all__ = ["infra", "new_stack", "stack"]
