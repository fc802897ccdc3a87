"""What the real service used is in its ledger, for clients and for who owns the machine."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.e2e.conftest import Tuned
from tests.e2e.service import Service


def test_a_job_and_its_model_are_in_the_ledger_as_they_were_counted(
    service: Service, tuned: Tuned
) -> None:
    outcrop = service.client("outcrop")
    pages = outcrop.get_paginator("get_usage").paginate(startTime=tuned.created["creationTime"])
    lines = {(line["type"], line["resourceArn"]): line for page in pages for line in page["lines"]}
    steps = outcrop.get_job_metrics(jobIdentifier=tuned.arn, maxResults=1000)["steps"]
    training = lines["training", tuned.arn]
    assert training["quantity"] == sum(step["tokens"] for step in steps) > 0
    assert training["tags"]["team"] == "geology"
    storage = lines["storage", tuned.job["outputModelArn"]]
    assert storage["price"] == "1.95"
    assert storage["tags"]["kind"] == "first"
    printed = subprocess.run(
        [sys.executable, "-m", "outcrop", "cost", "--json", "--by", "type",
         "--data-dir", str(service.data_dir)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kinds = [group["group"]["type"] for group in json.loads(printed.stdout)["groups"]]
    assert kinds[:2] == ["training", "storage"]


def test_a_job_is_estimated_without_being_started(service: Service, tuned: Tuned) -> None:
    names = ("roleArn", "baseModelIdentifier", "hyperParameters", "trainingDataConfig",
             "outputDataConfig")  # fmt: skip
    members = {name: tuned.request[name] for name in names}
    told = service.client("outcrop").estimate_job(**members)["estimate"]
    assert told["fits"] is True
    assert told["measuredBy"] == "tuned-job"
    assert told["disk"]["neededBytes"] < told["disk"]["freeBytes"]
