"""Broken variants of the services: each module breaks one thing and runs the service.

A name begins with the service that it breaks. A run with `--mutant` must fail; otherwise the checker misses
faults.
"""

__all__: list[str] = []
