"""How long GetModelCustomizationJob takes at 50 requests a second.

Requests arrive when a fixed random schedule says (open loop): a slow answer does not delay the next
request, and its own waiting counts. They are signed beforehand and sent over kept connections, so
what is measured is the service, not boto3.

    python -m benchmarks.get_job_latency [--rate 50] [--seconds 30] [--while-training]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import boto3
from benchmarks.running import Running, percentile, running_service, write_result
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
WARM_UP_REQUESTS = 100
TRAINING_STARTS_SECONDS = 60


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the run")
    parser.add_argument(
        "--while-training", action="store_true", help="measure while that very job trains"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="outcrop-latency-") as name,
        running_service(Path(name) / "data") as service,
    ):
        arn = make_job(service, keep_running=options.while_training)
        latencies = asyncio.run(measure(service, arn, options.rate, options.seconds))
    milliseconds = [1000 * latency for latency in latencies]
    rows = [
        ("what", "measured", "target"),
        ("requests", str(len(milliseconds)), ""),
        ("p50", f"{percentile(milliseconds, 0.50):.2f} ms", "5 ms"),
        ("p90", f"{percentile(milliseconds, 0.90):.2f} ms", ""),
        ("p99", f"{percentile(milliseconds, 0.99):.2f} ms", "25 ms"),
        ("slowest", f"{max(milliseconds):.2f} ms", ""),
    ]
    state = "while the job trains" if options.while_training else "with no job running"
    write_result(
        "get_job_latency" + ("_while_training" if options.while_training else ""),
        f"{options.rate:g} requests a second for {options.seconds:g} s, {state}. Arrivals are "
        "exponential with a fixed seed. A latency runs from the scheduled arrival to the last "
        f"byte of the answer; {WARM_UP_REQUESTS} requests before are not counted.",
        rows,
        "Client and service share the machine, so the client's own time is in the numbers.",
    )


def make_job(service: Running, *, keep_running: bool) -> str:
    """Create the job that is asked for; unless it is to run on, stop it."""
    s3 = boto3.client("s3", **service.credentials())
    bedrock = boto3.client("bedrock", **service.credentials())
    lines = [json.dumps({"prompt": f"Part {n}?", "completion": f"Shelf {n}"}) for n in range(512)]
    s3.create_bucket(Bucket="latency")
    s3.put_object(Bucket="latency", Key="train.jsonl", Body="\n".join(lines).encode())
    arn: str = bedrock.create_model_customization_job(
        jobName="latency",
        customModelName="latency",
        roleArn=ROLE,
        baseModelIdentifier="amazon.titan-text-express-v1",
        hyperParameters={"epochCount": "10"},
        trainingDataConfig={"s3Uri": "s3://latency/train.jsonl"},
        outputDataConfig={"s3Uri": "s3://latency/output"},
    )["jobArn"]
    if not keep_running:
        bedrock.stop_model_customization_job(jobIdentifier=arn)
    deadline = time.monotonic() + TRAINING_STARTS_SECONDS
    while time.monotonic() < deadline:
        job = bedrock.get_model_customization_job(jobIdentifier=arn)
        training = job["statusDetails"]["trainingDetails"]["status"]
        if job["status"] == "Stopped" or (keep_running and training == "InProgress"):
            return arn
        time.sleep(0.2)
    raise SystemExit(f"the job is still {job['status']}: {job['statusDetails']}")


async def measure(service: Running, arn: str, rate: float, seconds: float) -> list[float]:
    """Send the requests as the schedule says; returns their latencies in seconds."""
    num_requests = int(rate * seconds) + WARM_UP_REQUESTS
    chance = random.Random(0)
    arrivals, at = [], 0.0
    for _ in range(num_requests):
        at += chance.expovariate(rate)
        arrivals.append(at)
    request = signed_request(service, arn)
    connections: list[Connection] = []
    started = time.perf_counter() + 0.1

    async def one(arrival: float) -> float:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        connection = connections.pop() if connections else await Connection.open(service.url)
        await connection.exchange(request)
        connections.append(connection)
        return time.perf_counter() - started - arrival

    latencies = await asyncio.gather(*(one(arrival) for arrival in arrivals))
    for connection in connections:
        await connection.close()
    return list(latencies[WARM_UP_REQUESTS:])


def signed_request(service: Running, arn: str) -> bytes:
    """Return the bytes of a signed GetModelCustomizationJob."""
    keys = service.credentials()
    credentials = Credentials(keys["aws_access_key_id"], keys["aws_secret_access_key"])
    url = f"{service.url}/model-customization-jobs/{quote(arn, safe='')}"
    request = AWSRequest("GET", url)
    SigV4Auth(credentials, "bedrock", keys["region_name"]).add_auth(request)
    target = urlsplit(url)
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    head = f"GET {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\n{headers}\r\n"
    return head.encode()


class Connection:
    """A kept HTTP/1.1 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect to the host and port of a URL."""
        target = urlsplit(url)
        return cls(*await asyncio.open_connection(target.hostname, target.port))

    async def exchange(self, request: bytes) -> bytes:
        """Send a request and return the body of its answer, which must be a 200."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status = head.split(" ", 2)[1]
        length = int(head.lower().split("content-length:")[1].split()[0])
        body = await self.reader.readexactly(length)
        if status != "200":
            raise SystemExit(f"the service answered {status}: {body.decode()}")
        return body

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        await self.writer.wait_closed()


if __name__ == "__main__":
    main()
