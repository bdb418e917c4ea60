"""What tasks leave on disk, in Kafka's logs and in the database's files."""

from __future__ import annotations

from pathlib import Path

from tests.bench.servers import Installation

__all__ = ["bytes_a_task", "size"]


def size(directory: Path, pattern: str) -> int:
    """Return the bytes of all files under a directory that match a pattern."""
    return sum(file.stat().st_size for file in directory.glob(pattern))


def bytes_a_task(installation: Installation) -> dict[str, float]:
    """Return the bytes a task in Kafka (one replica, without indexes) and in the database.

    The database's files have free pages, so a few thousand tasks say little.
    """
    data, name = installation.servers.directory / "data", installation.name
    found = {
        # An index file has its full size from the beginning.
        "kafka": size(data / "kafka-1", f"{name}.*/*.log"),
        "mysql": size(data / installation.servers.database, f"{name}/*.ibd"),
    }
    return {server: number / installation.created for server, number in found.items()}
