"""The real service as a child process, and what tests ask of it as its clients do."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from tests.assets.smollm2 import place_smollm2
from tests.protocol.answers import check_client

from outcrop.identity import accounts
from outcrop.identity.bootstrap import load_credentials
from outcrop.identity.credentials import Credentials
from outcrop.settings import Settings
from outcrop.store.database import connect, transaction
from outcrop.wire.client import outcrop_client

ACCOUNT, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/BedrockCustomizationRole"
COHERE = "cohere.command-light-text-v14:7:4k"
TITAN = "amazon.titan-text-express-v1"
LLAMA = "meta.llama2-13b-v1"
PUBLISHED = {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"}
"""The hyperparameters of Bedrock's own examples."""

ONE_THREAD = {"OUTCROP_TRAIN_THREADS": "1", "OUTCROP_SERVE_THREADS": "1"}
"""Two processes of tests have a core each; threads that wait for one another would take far longer
than one thread does."""
START_SECONDS = 90.0
STOP_SECONDS = 10.0
JOB_SECONDS = 300.0
"""Far more than a job takes: attempts are nice, so other load on the machine holds them up."""
ENDED = ("Completed", "Failed", "Stopped")

T = TypeVar("T")


class Process(NamedTuple):
    """One line of the process table."""

    pid: int
    command: str


class Service:
    """`outcrop serve` on a data directory, started and ended any number of times."""

    warm: ClassVar[Path | None] = None
    """Data directory of the first service of this process. Those that start later have what it has
    compiled, packed and measured by then, which would take each of them many seconds."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self.settings = Settings(data_dir=data_dir)
        self.url = ""
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._clients: dict[object, Any] = {}

    @property
    def pid(self) -> int:
        """The process id of `outcrop serve` itself."""
        assert self._process is not None, "the service does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether `outcrop serve` runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start, wait for the ready line, and return how many seconds that took."""
        place_smollm2(self.data_dir)
        if self.warm is not None:
            _take_over(self.warm / "cache", self.data_dir / "cache")
        started = time.monotonic()
        self._process = self.spawn()
        self.url = _ready_url(self._process)
        Service.warm = Service.warm or self.data_dir
        return time.monotonic() - started

    def spawn(self) -> subprocess.Popen[str]:
        """Start `outcrop serve` on this data directory and return at once."""
        inherited = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("OUTCROP_", "AWS_"))
        }
        command = ("-m", "outcrop", "serve", "--port", "0", "--data-dir", str(self.data_dir))
        with (self.data_dir / "serve.log").open("ab") as log:
            return subprocess.Popen(
                (sys.executable, *command),
                env={**inherited, **ONE_THREAD, **self._environment},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def stop(self) -> float:
        """Send SIGTERM and return how many seconds the end took; it must come in time."""
        assert self._process is not None
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the service did not end within {STOP_SECONDS:g} s of SIGTERM")
        seconds = time.monotonic() - started
        self._forget()
        return seconds

    def kill(self) -> None:
        """Send SIGKILL to `outcrop serve`; its children end because it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    # --- clients ---------------------------------------------------------------------------------

    @property
    def owner(self) -> Credentials:
        """The credentials made at the first start."""
        found = load_credentials(self.settings)
        assert found is not None
        return found

    def client(
        self, name: str, *, credentials: Credentials | None = None, attempts: int = 3
    ) -> Any:
        """Return a boto3 client; `outcrop` names our own operations."""
        credentials = credentials or self.owner
        key = (name, credentials.access_key_id, credentials.secret_access_key, attempts)
        if key not in self._clients:
            options = {
                "endpoint_url": self.url,
                "region_name": REGION,
                "aws_access_key_id": credentials.access_key_id,
                "aws_secret_access_key": credentials.secret_access_key,
                "config": Config(read_timeout=120, retries={"total_max_attempts": attempts}),
            }
            made = outcrop_client(**options) if name == "outcrop" else boto3.client(name, **options)
            self._clients[key] = check_client(made)
        return self._clients[key]

    def user(self, name: str, *documents: dict[str, Any]) -> Credentials:
        """Return the key of a new user with these policies."""
        with self._writing() as connection:
            accounts.create_user(connection, ACCOUNT, name)
            for number, document in enumerate(documents):
                text = json.dumps(document)
                accounts.put_user_policy(connection, ACCOUNT, name, f"p{number}", text)
            return accounts.create_access_key(connection, ACCOUNT, name)

    def role(self, name: str, trusted: str, *documents: dict[str, Any]) -> str:
        """Write a role that a service principal may assume, and return its ARN."""
        trust = {"Effect": "Allow", "Principal": {"Service": trusted}, "Action": "sts:AssumeRole"}
        with self._writing() as connection:
            accounts.put_role(connection, ACCOUNT, name, json.dumps(policy(trust)))
            for number, document in enumerate(documents):
                text = json.dumps(document)
                accounts.put_role_policy(connection, ACCOUNT, name, f"p{number}", text)
        return f"arn:aws:iam::{ACCOUNT}:role/{name}"

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        engine = connect(self.settings.effective_database_url)
        try:
            with transaction(engine) as connection:
                yield connection
        finally:
            engine.dispose()

    # --- jobs ------------------------------------------------------------------------------------

    def create_job(self, bucket: str, name: str, **changes: Any) -> str:
        """Create a job of the published form and return its ARN."""
        request = job_request(bucket, name, **changes)
        return str(self.client("bedrock").create_model_customization_job(**request)["jobArn"])

    def job(self, identifier: str) -> dict[str, Any]:
        """Return what GetModelCustomizationJob answers."""
        found = self.client("bedrock").get_model_customization_job(jobIdentifier=identifier)
        return dict(found)

    def wait_for_job(self, identifier: str, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """Wait for a job's end and return it."""

        def ended() -> dict[str, Any] | None:
            found = self.job(identifier)
            return found if found["status"] in ENDED else None

        return wait_for(ended, seconds, f"the job {identifier} to end")

    def progress(self, identifier: str) -> dict[str, Any]:
        """Return what GetJobProgress answers."""
        return dict(self.client("outcrop").get_job_progress(jobIdentifier=identifier))

    def wait_for_step(self, identifier: str, step: int = 1) -> dict[str, Any]:
        """Wait until a job has done so many optimizer steps, and return its progress."""

        def reached() -> dict[str, Any] | None:
            found = self.progress(identifier)
            assert found["status"] == "InProgress", found
            return found if found.get("step", 0) >= step else None

        return wait_for(reached, JOB_SECONDS, f"step {step} of {identifier}")

    # --- processes -------------------------------------------------------------------------------

    def processes(self, part: str) -> list[Process]:
        """Return the service's processes whose command line holds `part`."""
        return [item for item in _descendants(self.pid) if part in item.command]

    def process(self, part: str) -> Process:
        """Wait for a process whose command line holds `part`."""
        return wait_for(
            lambda: next(iter(self.processes(part)), None), JOB_SECONDS, f"a process with {part}"
        )

    @contextmanager
    def paused(self, part: str) -> Iterator[None]:
        """Hold one of its processes still for the length of a `with` block."""
        pid = self.pid if part == "serve" else self.process(part).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def limit_file_size(self, part: str, num_bytes: int) -> None:
        """Have no file of a process, or of what it starts from now on, grow beyond a size."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(self.process(part).pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def policy(*statements: dict[str, Any]) -> dict[str, Any]:
    """Return a policy document."""
    return {"Version": "2012-10-17", "Statement": list(statements)}


def job_request(bucket: str, name: str, **changes: Any) -> dict[str, Any]:
    """Return the published form of CreateModelCustomizationJob; a change to None leaves out."""
    request: dict[str, Any] = {
        "customizationType": "FINE_TUNING",
        "jobName": name,
        "customModelName": f"{name}-model",
        "roleArn": ROLE,
        "baseModelIdentifier": COHERE,
        "hyperParameters": PUBLISHED,
        "trainingDataConfig": {"s3Uri": f"s3://{bucket}/train.jsonl"},
        "validationDataConfig": {"validators": [{"s3Uri": f"s3://{bucket}/validation.jsonl"}]},
        "outputDataConfig": {"s3Uri": f"s3://{bucket}/out/"},
        **changes,
    }
    return {key: value for key, value in request.items() if value is not None}


def records(count: int, first: int = 0) -> bytes:
    """Return a JSONL file of short prompt/completion records."""
    pairs = (
        {"prompt": f"Which code has part {number}?", "completion": f" code {number * 7 % 100:02}"}
        for number in range(first, first + count)
    )
    return b"".join(json.dumps(pair).encode() + b"\n" for pair in pairs)


def new_bucket(service: Service, name: str) -> str:
    """Make a bucket with training and validation records."""
    s3 = service.client("s3")
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="train.jsonl", Body=records(24))
    s3.put_object(Bucket=name, Key="validation.jsonl", Body=records(8, first=24))
    return name


def keys(service: Service, bucket: str, prefix: str = "") -> list[str]:
    """Return the keys of a bucket."""
    listed = service.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for item in listed.get("Contents", [])]


def in_service(service: Service, name: str, model: str) -> str:
    """Create a throughput and return its ARN once it is InService."""
    bedrock = service.client("bedrock")
    arn = bedrock.create_provisioned_model_throughput(
        provisionedModelName=name, modelId=model, modelUnits=1
    )["provisionedModelArn"]

    def reached() -> bool:
        found = bedrock.get_provisioned_model_throughput(provisionedModelId=arn)
        assert found["status"] in ("Creating", "InService"), found
        return bool(found["status"] == "InService")

    wait_for(reached, START_SECONDS, f"{name} to be InService")
    return str(arn)


def ask_base(service: Service) -> bytes:
    """Return the base model's greedy answer to a fixed prompt, as the bytes of the body."""
    body = b'{"prompt":"Which code has part 5?","max_gen_len":12,"temperature":0}'
    runtime = service.client("bedrock-runtime", attempts=8)
    answer = runtime.invoke_model(modelId="meta.llama3-1-8b-instruct-v1:0", body=body)
    return bytes(answer["body"].read())


class Refusal(NamedTuple):
    """An error as a client gets it."""

    code: str
    status: int
    message: str


def refusal(call: Callable[[], object]) -> Refusal:
    """Return the error of a call that must be refused."""
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    error = response["Error"]
    status = response["ResponseMetadata"]["HTTPStatusCode"]
    return Refusal(error["Code"], status, error.get("Message", ""))


def wait_for(probe: Callable[[], T | None], seconds: float, what: str) -> T:
    """Ask again and again until the answer is neither None nor False."""
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found is not None and found is not False:
            return found
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.05)


def _take_over(cache: Path, other: Path) -> None:
    """Link the files of a cache into another. All are written beside their place and renamed."""
    for file in cache.glob("*/*"):
        place = other / file.parent.name / file.name
        if file.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # it was being written
                place.hardlink_to(file)


def _ready_url(process: subprocess.Popen[str]) -> str:
    """Return the URL of the ready line; a service that ends or stays silent fails the test."""
    lines: queue.Queue[str] = queue.Queue()
    stdout = process.stdout
    assert stdout is not None
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=START_SECONDS)
    except queue.Empty:
        line = f"nothing in {START_SECONDS:g} s"
    if not line.startswith("ready "):
        process.kill()
        process.wait()
        pytest.fail(f"the service did not become ready but said: {line!r}")
    return line.split()[1]


def _descendants(root: int) -> list[Process]:
    listing = subprocess.run(
        ("ps", "-A", "-ww", "-o", "pid=,ppid=,args="), capture_output=True, text=True, check=True
    )
    children: dict[int, list[Process]] = {}
    for line in listing.stdout.splitlines():
        pid, parent, *command = line.split(maxsplit=2)
        children.setdefault(int(parent), []).append(Process(int(pid), " ".join(command)))
    found, left = [], [root]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += [item.pid for item in below]
    return found
