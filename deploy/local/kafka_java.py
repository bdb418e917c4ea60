"""Starts Kafka's programs, and makes the archive of their classes that halves the cost of a start.

Standard library only: `make setup` runs it on a bare python3.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from deploy.local.cache import cache_root, entry_path, make_entry
from deploy.local.commands import SetupError, run, say
from deploy.local.files import write_whole
from deploy.local.jars import POM, jars_path, make_jars
from deploy.local.ports import HOST, free_port

__all__ = ["META", "archive_path", "java", "make_archive", "storage_format"]

LOGGING, REQUEST_LOGGING = POM.parent / "log4j2.xml", POM.parent / "log4j2-requests.xml"
META, BOOTSTRAP = "meta.properties", "bootstrap.checkpoint"
# A busy machine starts a broker slowly, and several installers run beside it.
STARTS_WITHIN = 180.0
ENDS_WITHIN = 60.0


def _recipe() -> bytes:
    found = shutil.which("java")
    program = Path(found).resolve() if found else Path("java")
    version = program.stat().st_mtime_ns if found else 0
    return f"1 {program} {version} {jars_path()}".encode()


def archive_path() -> Path:
    """Return the path of the class archive, whether or not it exists."""
    return entry_path("kafka-classes", _recipe())


def java(heap: str, *options: str) -> list[str]:
    """Return the start of a command line that runs a class of Kafka's. `heap` is its limit (`512m`)."""
    archive = archive_path() / "kafka.jsa"
    shared = [f"-XX:SharedArchiveFile={archive}"] if archive.exists() else []
    logging = REQUEST_LOGGING if os.environ.get("POSTROAD_LOCAL_REQUEST_LOG") else LOGGING
    return [
        "java", f"-Xmx{heap}", "-XX:+UseSerialGC", "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={logging}", *shared, *options, "-cp", f"{jars_path()}/*",
    ]  # fmt: skip


def storage_format(data: Path, node: int, cluster: str) -> None:
    """Make the data directory of a node, which does not exist or is empty. Raises SetupError.

    Kafka's own program makes one once, and this copies it: a start of Java costs a second of CPU. The node
    gives its directory an id when it first starts.
    """
    template = make_entry("kafka-storage", _recipe(), _format)
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(template / BOOTSTRAP, data)
    # The last file: a directory that has it counts as formatted.
    write_whole(data / META, f"version=1\ncluster.id={cluster}\nnode.id={node}\n")


def _format(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".format-", dir=cache_root()) as scratch:
        # The ports are in the configuration only.
        configuration = _configuration(Path(scratch), target, client=1, controller=2)
        tool = "kafka.tools.StorageTool"
        run([*java("128m", "-XX:TieredStopAtLevel=1"), tool, "format", "-t", "A" * 22, "-c", configuration])


def _configuration(scratch: Path, data: Path, *, client: int, controller: int) -> Path:
    """Write the least server.properties that a single node needs. Return its path."""
    path = scratch / "server.properties"
    path.write_text(
        "process.roles=broker,controller\n"
        "node.id=1\n"
        f"controller.quorum.voters=1@{HOST}:{controller}\n"
        "controller.listener.names=CONTROLLER\n"
        f"listeners=PLAINTEXT://{HOST}:{client},CONTROLLER://{HOST}:{controller}\n"
        "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\n"
        f"log.dirs={data}\n"
    )
    return path


def make_archive() -> None:
    """Fetch the jars, and make the class archive (AppCDS) by a trial start of a broker.

    A broker's start took 3.1 s of CPU without the archive and 1.8 s with it. So a failed trial start is only
    a warning, and the next setup tries again. Raises SetupError when the jars cannot be fetched. Java ignores
    an archive that does not fit.
    """

    make_jars()

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".broker-", dir=cache_root()) as scratch:
            data, client = Path(scratch) / "data", free_port(())
            configuration = _configuration(Path(scratch), data, client=client, controller=free_port(()))
            storage_format(data, 1, "A" * 22)
            archive = f"-XX:ArchiveClassesAtExit={target}/kafka.jsa"
            _run_broker([*java("512m", archive), "kafka.Kafka", str(configuration)], client)

    try:
        make_entry("kafka-classes", _recipe(), build)
    except SetupError as error:
        say(f"made no class archive for Kafka ({error}); each start takes a second longer")


def _run_broker(argv: list[str], port: int) -> None:
    broker = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not _listens(port):
            if broker.poll() is not None or time.monotonic() > deadline:
                raise SetupError("a trial start of Kafka failed")
            time.sleep(0.1)
        broker.terminate()
        broker.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired as error:
        raise SetupError("a trial start of Kafka did not end") from error
    finally:
        broker.kill()
        broker.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True
