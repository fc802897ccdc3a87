"""A custom model leaves the service as files that its manifest vouches for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from tests.e2e.conftest import Tuned
from tests.e2e.service import ENDED, JOB_SECONDS, ROLE, Service, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_custom_model_is_exported_into_the_owners_bucket(service: Service, tuned: Tuned) -> None:
    ours, s3 = service.client("outcrop"), service.client("s3")
    export = ours.export_model(
        modelIdentifier=tuned.job["outputModelArn"],
        roleArn=ROLE,
        format="adapter",
        outputDataConfig={"s3Uri": f"s3://{tuned.bucket}/exports"},
    )["exportArn"]

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = ours.get_model_export(exportIdentifier=export)
        return found if found["status"] in ENDED else None

    found = wait_for(ended, JOB_SECONDS, "the export to end")
    assert found["status"] == "Completed", found.get("failureMessage")

    def read(uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())

    manifest = json.loads(read(found["manifest"]))
    assert manifest["modelArn"] == tuned.job["outputModelArn"]
    listed = {row["name"]: row["sha256"] for row in manifest["files"]}
    assert set(listed) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for row in found["outputs"]:
        content = read(row["s3Uri"])
        assert hashlib.sha256(content).hexdigest() == listed[row["name"]] == row["sha256"]
    summaries = ours.list_model_exports()["modelExportSummaries"]
    assert export in [row["exportArn"] for row in summaries]
