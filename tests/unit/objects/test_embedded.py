"""Promises of the embedded object store, asked of a real one. Most answer a trap it comes with."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.objects import embedded, internal
from outcrop.objects.client import ObjectStore, backend, object_store
from outcrop.settings import Settings

if TYPE_CHECKING:
    from tests.unit.objects.conftest import Running

needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="looks into /proc, which only Linux has"
)


def ports_of(running: Running) -> dict[str, int]:
    text = (internal.secrets_folder(running.data_dir) / "ports.json").read_text()
    found: dict[str, int] = json.loads(text)
    return found


def kill_9_and_wait(running: Running) -> float:
    """Kill the store and wait until it answers again; returns the seconds that took."""
    killed = running.pid
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    assert running.supervisor.run(
        lambda: (
            (status := running.supervisor.status(embedded.NAME)) is not None
            and status.pid not in (None, killed)
        ),
        timeout=30,
    )
    running.supervisor.wait_ready(timeout=30)
    return time.monotonic() - began


def status_of(port: int, method: str, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body=b"planted" if method in ("PUT", "POST") else None)
        return connection.getresponse().status
    finally:
        connection.close()


def test_filer_port_is_closed_to_strangers(shared: Running, bucket: str) -> None:
    """By default anyone on the machine reads and writes every object through the filer's port."""
    shared.objects.write(S3Uri(bucket, "train.jsonl"), b"private")
    path = f"/buckets/{bucket}/train.jsonl"
    filer = ports_of(shared)["filer"]

    assert status_of(filer, "GET", path) == 404
    assert status_of(filer, "PUT", path) == 404
    assert status_of(filer, "POST", path) == 404
    assert status_of(filer, "DELETE", path) == 404
    assert shared.objects.read(S3Uri(bucket, "train.jsonl")) == b"private"


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
def test_volume_port_is_closed_to_strangers(shared: Running, bucket: str, method: str) -> None:
    """Objects lie there by number; a guessed number must not do."""
    shared.objects.write(S3Uri(bucket, "train.jsonl"), b"private")
    port = ports_of(shared)["volume"]

    statuses = [status_of(port, method, f"/{volume},0100000000") for volume in range(1, 5)]
    assert set(statuses) == {401}


@pytest.mark.parametrize("path", ["/dir/assign", "/dir/lookup?volumeId=1", "/vol/grow", "/submit"])
def test_master_port_gives_no_orders(shared: Running, path: str) -> None:
    assert status_of(ports_of(shared)["master"], "GET", path) == 404


@pytest.mark.parametrize("path", ["/", "/login", "/api/users", "/object-store/users"])
def test_administration_is_off(shared: Running, path: str) -> None:
    assert status_of(ports_of(shared)["admin"], "GET", path) == 404


HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.mark.parametrize("part", ["master", "volume", "filer", "s3", "admin"])
@pytest.mark.parametrize("caller", ["without TLS", "without certificate", "itself"])
def test_grpc_ports_ask_for_a_certificate(shared: Running, part: str, caller: str) -> None:
    """By default `weed shell` lists the secret keys of all S3 users to anyone on the machine."""
    secrets = internal.secrets_folder(shared.data_dir)
    answer = b""
    with socket.create_connection(("127.0.0.1", ports_of(shared)[f"{part}_grpc"]), 10) as plain:
        try:
            connection: socket.socket = plain
            if caller != "without TLS":
                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                context.set_alpn_protocols(["h2"])
                if caller == "itself":
                    context.load_cert_chain(secrets / "weed.crt", secrets / "weed.key")
                connection = context.wrap_socket(plain)
            connection.sendall(HTTP2_PREFACE)
            answer = connection.recv(100)
        except (ssl.SSLError, ConnectionError):
            pass
        finally:
            connection.close()
    # A gRPC server that lets one in begins with a SETTINGS frame, which is of type 4.
    assert (answer[3:4] == b"\x04") == (caller == "itself")


def test_only_the_owner_reaches_the_local_sockets(shared: Running) -> None:
    sockets = [
        Path(f"/tmp/seaweedfs-{name.removesuffix('_grpc')}-grpc-{port}.sock")
        for name, port in ports_of(shared).items()
        if name.endswith("_grpc")
    ]
    sockets += internal.secrets_folder(shared.data_dir).glob("*.sock")
    present = [path for path in sockets if path.exists()]

    assert len(present) >= 5
    assert all(path.stat().st_mode & 0o077 == 0 for path in present)


def sockets_of(pid: int) -> Iterator[tuple[str, str]]:
    """Yield local and remote address (hexadecimal, as the kernel has them) of a process."""
    numbers = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if found := re.fullmatch(r"socket:\[(\d+)\]", target):
            numbers.add(found[1])
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in numbers:
                yield fields[1], fields[2]


@needs_proc
def test_no_telemetry(shared: Running, bucket: str) -> None:
    """It sends statistics to its maker by default. Every socket it has is on loopback."""
    shared.objects.write(S3Uri(bucket, "k"), b"1")
    arguments = Path(f"/proc/{shared.pid}/cmdline").read_bytes().decode().split("\0")

    assert "-master.telemetry=false" in arguments
    assert "-master.telemetry.url=" in arguments
    loopback = "0100007F"
    nowhere = "00000000:0000"
    found = list(sockets_of(shared.pid))
    assert len(found) >= 10
    for local, remote in found:
        assert local.split(":")[0] == loopback
        assert remote == nowhere or remote.split(":")[0] == loopback


@needs_proc
def test_no_secret_is_on_the_command_line(shared: Running) -> None:
    """Every user of the machine can read it."""
    command_line = Path(f"/proc/{shared.pid}/cmdline").read_text()
    keys = internal.read_internal_keys(shared.data_dir)

    assert str(internal.secrets_folder(shared.data_dir)) in command_line
    for secret in (keys.access_key_id, keys.secret_access_key, keys.sse_key):
        assert secret not in command_line


def test_keys_of_the_environment_become_no_administrator(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`weed mini` makes an administrator of AWS_ACCESS_KEY_ID, where it is set."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTHEUSER")
    spec = embedded.child_spec(shared.settings, embedded.Ports(**ports_of(shared)))

    assert spec.environment is not None
    assert not [name for name in spec.environment if name.startswith(("AWS_", "S3_"))]


def test_secrets_are_private_and_apart_from_the_objects(shared: Running) -> None:
    folder = internal.secrets_folder(shared.data_dir)
    keys = internal.read_internal_keys(shared.data_dir)

    assert folder.stat().st_mode & 0o777 == 0o700
    assert internal.objects_folder(shared.data_dir).stat().st_mode & 0o777 == 0o700
    for name in ("keys.json", "s3.json", "security.toml", "weed.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    for path in internal.objects_folder(shared.data_dir).rglob("*"):
        assert "kek" not in path.name
        if path.is_file():
            assert keys.sse_key.encode() not in path.read_bytes()


def test_parts_of_the_object_store_reach_each_other(shared: Running) -> None:
    """With another gRPC port, the worker that reclaims deleted space never finds its master."""
    log = shared.data_dir / "logs" / "object-store.log"

    assert "WORKER STARTED" in log.read_text()
    assert "CONNECTION FAILED" not in log.read_text()


def test_sixty_buckets_can_be_written(shared: Running) -> None:
    """With the default number of volumes, the 50th could not."""
    objects = shared.objects

    def write_first(number: int) -> bytes:
        name = f"many-{number}"
        objects.create_bucket(name)
        objects.write(S3Uri(name, "k"), str(number).encode())
        return objects.read(S3Uri(name, "k"))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(write_first, range(60))) == [b"%d" % n for n in range(60)]


def test_an_upload_makes_no_bucket(shared: Running) -> None:
    """By default it does: a misspelt bucket would take the data, and the job would not find it."""
    with pytest.raises(ObjectStoreError, match="NoSuchBucket"):
        shared.objects.write(S3Uri("mis-spelt", "k"), b"1")


def test_memory_stays_bounded_after_a_large_upload(shared: Running, bucket: str) -> None:
    """By default it keeps 600 MB and more after one large object."""
    block = os.urandom(1 << 20)
    shared.objects.write(S3Uri(bucket, "large"), block * 128)
    with shared.objects.open(S3Uri(bucket, "large")) as stream:
        while read := stream.read(1 << 20):
            assert read == block

    assert peak_megabytes(shared.pid) < 400


@needs_proc
def test_idle_store_leaves_the_cores_alone(shared: Running) -> None:
    """With too low a memory target, its garbage collector alone takes a tenth of a core."""

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{shared.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    deadline = time.monotonic() + 30
    while True:  # until what earlier tests left to do is done
        before = cpu_seconds()
        shared.supervisor.run(lambda: False, timeout=2)
        if cpu_seconds() - before <= 0.08:
            return
        assert time.monotonic() < deadline


def peak_megabytes(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        pytest.skip("looks into /proc, which only Linux has")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def test_objects_survive_kill_9(mortal: Running) -> None:
    objects = mortal.objects
    objects.create_bucket("killed")
    contents = {f"key-{number}": os.urandom(1 + number * 5000) for number in range(40)}
    for key, content in contents.items():
        objects.write(S3Uri("killed", key), content)
    url = backend(mortal.settings).url

    seconds = kill_9_and_wait(mortal)

    assert seconds < 10
    assert {info.uri.key for info in objects.list("killed")} == set(contents)
    for key, content in contents.items():
        assert objects.read(S3Uri("killed", key)) == content
    # Who holds its address need not learn a new one.
    assert backend(mortal.settings).url == url
    objects.write(S3Uri("killed", "after"), b"1")


def test_sse_s3_survives_kill_9(mortal: Running) -> None:
    """Encrypted objects are readable after a restart, and not readable on disk."""
    objects = mortal.objects
    objects.create_bucket("encrypted")
    uri, secret, plain = S3Uri("encrypted", "sse"), os.urandom(7000), os.urandom(7000)
    objects._client.put_object(
        Bucket="encrypted", Key="sse", Body=secret, ServerSideEncryption="AES256"
    )
    objects.write(S3Uri("encrypted", "plain"), plain)

    kill_9_and_wait(mortal)

    assert objects.read(uri) == secret
    assert objects.read(S3Uri("encrypted", "plain")) == plain
    assert (
        objects._client.head_object(Bucket="encrypted", Key="sse")["ServerSideEncryption"]
        == "AES256"
    )
    on_disk = b"".join(
        path.read_bytes() for path in internal.objects_folder(mortal.data_dir).rglob("*.dat")
    )
    assert plain in on_disk
    assert secret[:100] not in on_disk


def test_restart_keeps_objects_on_other_ports(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    urls = []
    for number in range(2):
        with embedded.running(settings):
            objects = object_store(settings)
            urls.append(objects.backend.url)
            objects.create_bucket(f"bucket-{number}")
            objects.write(S3Uri(f"bucket-{number}", "k"), str(number).encode())
            found = [objects.read(S3Uri(f"bucket-{n}", "k")) for n in range(number + 1)]
            assert found == [str(n).encode() for n in range(number + 1)]
    assert len(set(urls)) == 2
    # Nothing of the earlier runs' ports is left to pile up.
    assert len(list(internal.objects_folder(data_dir).glob("m[0-9]*"))) == 1


def test_stop_is_quick_and_leaves_no_address(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    with embedded.running(settings) as supervisor:
        began = time.monotonic()
        supervisor.stop_all(10)
        assert time.monotonic() - began < embedded.STOP_SECONDS + 1

    with pytest.raises(ObjectStoreError, match="is not running"):
        backend(settings)


def test_flags_of_an_earlier_run_do_not_come_back(data_dir: Path) -> None:
    """`weed mini` stores its flags among the objects and takes them up again."""
    settings = Settings(data_dir=data_dir)
    embedded.prepare(settings)
    options = internal.objects_folder(data_dir) / "mini.options"
    options.write_text("webdav=true\n")

    embedded.prepare(settings)
    assert not options.exists()


def test_ports_are_kept_unless_taken(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    ports = embedded.prepare(settings)

    assert embedded.prepare(settings, ports) == ports
    with socket.create_server(("127.0.0.1", ports.s3)):
        assert embedded.prepare(settings, ports).s3 != ports.s3


def test_keys_last_and_everything_else_is_made_anew(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    folder = internal.secrets_folder(data_dir)

    def read() -> dict[str, bytes]:
        embedded.prepare(settings)
        return {name: (folder / name).read_bytes() for name in ("keys.json", "weed.key", "ca.crt")}

    first, second = read(), read()
    assert first["keys.json"] == second["keys.json"]
    assert first["weed.key"] != second["weed.key"]
    assert first["ca.crt"] != second["ca.crt"]


def test_objects_without_their_keys_are_refused(data_dir: Path) -> None:
    """New keys would leave encrypted objects unreadable, and nobody would know why."""
    settings = Settings(data_dir=data_dir)
    embedded.prepare(settings)
    (internal.objects_folder(data_dir) / "1.dat").write_bytes(b"data")
    (internal.secrets_folder(data_dir) / "keys.json").unlink()

    with pytest.raises(ObjectStoreError, match=r"holds objects, but the keys(.|\n)*are gone"):
        embedded.prepare(settings)


def test_store_that_lets_strangers_in_is_not_ready() -> None:
    """Readiness is the refusal of a caller without a key, not any answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ports = embedded.Ports(**dict.fromkeys(embedded.Ports.__dataclass_fields__, port))

        def answer_ok() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        with ThreadPoolExecutor(1) as thread:
            thread.submit(answer_ok)
            assert not embedded.answers(ports)
    assert not embedded.answers(ports)


def test_strangers_are_refused(shared: Running) -> None:
    ports = embedded.Ports(**ports_of(shared))
    assert embedded.answers(ports)

    good = shared.objects.backend
    for wrong, code in (
        (replace(good, secret_access_key="wrong"), "SignatureDoesNotMatch"),
        (replace(good, access_key_id="AKIDUNKNOWN"), "InvalidAccessKeyId"),
    ):
        with pytest.raises(ObjectStoreError) as raised:
            ObjectStore(wrong).buckets()
        assert raised.value.code == code
