"""A thousand custom models on one base: how soon any of them answers, and what memory they take.

    python -m benchmarks.serving_adapters [--models 1000] [--asked 100]

Starts a service of its own, publishes the models and buys each a throughput. Then some, drawn by a
seed, are asked for the first time, one after the other; then all of them once, so that the model
server's cache is filled and emptied many times; then the first ones again. Models' files are links
to eight adapters, so the machine's file cache holds them, as it does those of models in use.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
from benchmarks.adapter_files import write_adapters
from benchmarks.custom_models import (
    allowed,
    buy,
    place_weights,
    process_of,
    publish,
    resident_bytes,
)
from benchmarks.running import percentile, running_service, write_result
from benchmarks.serving_work import NUM_ADAPTERS, RANK
from benchmarks.training_work import CACHE, shipped_weights

from outcrop.serve.adapters import MAX_ADAPTER_BYTES

BASE_MODEL = "amazon.titan-text-express-v1"
ANSWER_TOKENS = 8
TARGET_SECONDS = 0.5


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--asked", type=int, default=100, help="asked one by one")
    options = parser.parse_args()
    adapters = write_adapters(shipped_weights(None), CACHE / "adapters", NUM_ADAPTERS)
    with tempfile.TemporaryDirectory(prefix="many-", dir=CACHE) as name:
        data_dir = Path(name) / "data"
        place_weights(data_dir)
        # A thousandth of the machine would be throttled; what is measured here is loading.
        settings = allowed(options.models, OUTCROP_MACHINE_TOKENS_PER_SECOND="1000000")
        with running_service(data_dir, settings) as service:
            bedrock = boto3.client("bedrock", **service.credentials())
            runtime = boto3.client("bedrock-runtime", **service.credentials())
            ask(runtime, BASE_MODEL)
            server = process_of(service, "model-server")
            before = resident_bytes(server)
            started = time.perf_counter()
            throughputs = buy(bedrock, publish(data_dir, adapters, options.models))
            registered = time.perf_counter() - started
            after_registering = resident_bytes(server)
            base = [ask(runtime, BASE_MODEL) for _ in range(20)]
            drawn = random.Random(0).sample(throughputs, options.asked)
            firsts = [ask(runtime, arn) for arn in drawn]
            agains = [ask(runtime, drawn[-1]) for _ in range(20)]
            rest = [arn for arn in throughputs if arn not in set(drawn)]
            all_others = [ask(runtime, arn) for arn in rest]
            evicted = [ask(runtime, arn) for arn in drawn]
            after = resident_bytes(server)
    rows: list[tuple[str, ...]] = [("an answer of 8 tokens", "requests", "p50", "p99", "slowest")]
    for label, seconds in (
        ("of the base", base),
        ("of a model in memory", agains),
        ("of a model that is asked for the first time", firsts),
        ("of each of the others, for the first time", all_others),
        ("of the first ones again, after all others", evicted),
    ):
        values = (statistics.median(seconds), percentile(seconds, 0.99), max(seconds))
        rows.append((label, str(len(seconds)), *(f"{value:.3f} s" for value in values)))
    grown = (after - after_registering) / 2**20
    write_result(
        "serving_adapters",
        f"{options.models} custom models, adapters of rank {RANK} on all linear layers (19.6 MB "
        "each), each with a provisioned throughput, asked through boto3 one after the other; "
        f"answers of {ANSWER_TOKENS} tokens, greedy. Wanted: within {TARGET_SECONDS} s of the "
        "first use.",
        rows,
        f"Publishing and buying took {registered:.1f} s. The model server had "
        f"{before / 2**20:.0f} MiB resident after the base's first answer, "
        f"{after_registering / 2**20:.0f} MiB with all models registered and "
        f"{after / 2**20:.0f} MiB at the end: {grown:.0f} MiB more, where "
        f"{MAX_ADAPTER_BYTES / 2**20:.0f} MiB are allowed for adapters. Of the models' files "
        "eight are different.",
    )


def ask(runtime: Any, model: str) -> float:
    """Return how many seconds an answer took."""
    settings = {"temperature": 0, "maxTokenCount": ANSWER_TOKENS}
    body = json.dumps({"inputText": "Name three rocks.", "textGenerationConfig": settings})
    started = time.perf_counter()
    runtime.invoke_model(modelId=model, body=body)["body"].read()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
