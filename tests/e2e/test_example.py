"""The example program, started as its reader would: with what `outcrop env` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.conftest import Tuned
from tests.e2e.service import Service, records

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"


def after_outcrop_env(service: Service) -> dict[str, str]:
    """Return our environment as `outcrop env` would make it."""
    command = (sys.executable, "-m", "outcrop", "env", "--data-dir", service.data_dir)
    printed = subprocess.run((*command, "--shell", "json"), capture_output=True, check=True).stdout
    environment = dict(os.environ)
    for name, value in json.loads(printed).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


@pytest.mark.slow
def test_the_example_runs_with_what_outcrop_env_prints(
    service: Service, tuned: Tuned, tmp_path: Path
) -> None:
    # `tuned` first, or the example's job waits for that one.
    for name, count, first in (("training", 8, 0), ("validation", 4, 100), ("test", 3, 200)):
        (tmp_path / f"{name}.jsonl").write_bytes(records(count, first))
    done = subprocess.run(
        (sys.executable, EXAMPLES / "customize.py", tmp_path),
        env=after_outcrop_env(service),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("exact match", "perplexity", "Three answers side by side", "3 of 3 answers"):
        assert text in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 100] == []
    left = service.client("bedrock").list_custom_models(nameContains="operations")
    assert left["modelSummaries"] == []
