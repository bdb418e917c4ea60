"""Apache Kafka's jars, brought by Maven into the cache.

Standard library only: `make setup` runs it on a bare python3.
"""

from pathlib import Path

from deploy.local.cache import entry_path, make_entry
from deploy.local.commands import run

__all__ = ["jars_path", "make_jars"]

POM = Path(__file__).parent / "kafka" / "pom.xml"


def jars_path() -> Path:
    """The directory of jars that pom.xml names, whether or not it is there."""
    return entry_path("kafka", POM.read_bytes())


def make_jars() -> Path:
    """The directory of jars, fetched if it is not there (44 MB, 4-7 s). Raises SetupError."""

    def build(target: Path) -> None:
        run(
            ["mvn", "-q", "-B", "-f", POM, "dependency:copy-dependencies",
             "-DincludeScope=runtime", f"-DoutputDirectory={target}"],
            tries=4,
        )  # fmt: skip

    return make_entry("kafka", POM.read_bytes(), build)
