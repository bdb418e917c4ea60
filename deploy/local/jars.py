"""Apache Kafka's jars, which Maven fetches into the cache.

Standard library only: `make setup` runs it on a bare python3.
"""

from pathlib import Path

from deploy.local.cache import entry_path, make_entry
from deploy.local.commands import run

__all__ = ["jars_path", "make_jars"]

POM = Path(__file__).parent / "kafka" / "pom.xml"


def jars_path() -> Path:
    """Return the directory of the jars that pom.xml names, whether or not it exists."""
    return entry_path("kafka", POM.read_bytes())


def make_jars() -> Path:
    """Return the directory of the jars; fetch them if it does not exist (44 MB, 4-7 s). Raises SetupError."""

    def build(target: Path) -> None:
        run(
            ["mvn", "-q", "-B", "-f", POM, "dependency:copy-dependencies",
             "-DincludeScope=runtime", f"-DoutputDirectory={target}"],
            tries=4,
        )  # fmt: skip

    return make_entry("kafka", POM.read_bytes(), build)
