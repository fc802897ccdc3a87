"""A second service on the same data is refused, and a model server that is killed comes back."""

from __future__ import annotations

import json
import os
import signal

import pytest
from tests.e2e.service import Service, ask_base

from outcrop.models.weights import SHIPPED_KEY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL_SERVER = f"outcrop model-server --weights {SHIPPED_KEY}"
"""That of the base; models of weights of their own have others beside it."""


def test_a_second_service_on_the_same_data_is_refused(service: Service) -> None:
    second = service.spawn()
    try:
        code = second.wait(60)
    finally:
        second.kill()
        assert second.stdout is not None
        second.stdout.close()
    assert code not in (0, None)
    said = (service.data_dir / "serve.log").read_text(encoding="utf-8")
    assert str(service.pid) in said, "it must name the process that holds the directory"
    assert service.client("sts").get_caller_identity()


def test_the_next_invocation_answers_after_the_model_server_was_killed(
    service: Service, throughput: str
) -> None:
    before = ask_base(service)
    pid = service.process(MODEL_SERVER).pid
    os.kill(pid, signal.SIGKILL)
    assert ask_base(service) == before
    assert service.process(MODEL_SERVER).pid != pid
    body = json.dumps({"prompt": "Hello", "max_tokens": 2, "temperature": 0})
    runtime = service.client("bedrock-runtime", attempts=8)
    assert runtime.invoke_model(modelId=throughput, body=body)["body"].read()
