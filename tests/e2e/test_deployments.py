"""A deployment and a throughput on the real service move while somebody keeps asking."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from tests.assets.smollm2 import smollm2_folder
from tests.e2e.service import Service, ask_base, in_service, wait_for
from tests.unit.serve.tiny_chat import write_random_adapter
from tests.unit.store.build import new_model

from outcrop.models.artifact import folder_digest
from outcrop.models.weights import SHIPPED_KEY
from outcrop.store import models
from outcrop.store.database import connect, transaction
from outcrop.store.rows import NewCustomModel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SECONDS = 90.0
LONG = 32
"""Tokens of the answer that runs through the update."""


@pytest.fixture
def custom(service: Service) -> Iterator[list[NewCustomModel]]:
    """Two custom models that change the base, each in its own way, without a job that made them."""
    found = []
    for seed, name in enumerate(("deployed-first", "deployed-second")):
        new = new_model(name, spec={"weights": SHIPPED_KEY})
        artifact = service.data_dir / new.artifact_path
        write_random_adapter(smollm2_folder(), artifact, seed=seed, size=0.1)
        found.append(replace(new, artifact_digest=folder_digest(artifact)))
    engine = connect(service.settings.effective_database_url)
    with transaction(engine) as connection:
        for each in found:
            models.insert_model(connection, each)
    engine.dispose()
    yield found
    for each in found:
        service.client("bedrock").delete_custom_model(modelIdentifier=each.arn)


def test_deployment_and_throughput_move_while_somebody_keeps_asking(
    service: Service,
    custom: list[NewCustomModel],
    name: str,
    drop_throughput: Callable[[str], None],
) -> None:
    bedrock = service.client("bedrock")
    runtime = service.client("bedrock-runtime", attempts=1)  # nothing may be asked twice

    def body(tokens: int) -> str:
        options = {"maxTokenCount": tokens, "temperature": 0}
        return json.dumps({"inputText": "Count.", "textGenerationConfig": options})

    def ask(model: str, tokens: int = 8) -> str:
        answer = runtime.invoke_model(modelId=model, body=body(tokens))
        return str(json.loads(answer["body"].read())["results"][0]["outputText"])

    ask_base(service)  # has the model server loaded, with patience
    old, new = (ask(each.arn) for each in custom)
    whole = ask(custom[0].arn, LONG)
    assert old != new
    deployed = bedrock.create_custom_model_deployment(
        modelDeploymentName=name, modelArn=custom[0].arn
    )["customModelDeploymentArn"]
    named = {"customModelDeploymentIdentifier": deployed}
    assert ask(deployed) == old, "also before it is Active"

    def deployment() -> dict[str, Any]:
        return dict(bedrock.get_custom_model_deployment(**named))

    def throughput() -> dict[str, Any]:
        return dict(bedrock.get_provisioned_model_throughput(provisionedModelId=bought))

    def are_moved() -> bool:
        told = deployment()["updateDetails"]["updateStatus"]
        return bool(told == "UpdateCompleted" and throughput()["status"] == "InService")

    drop_throughput(name)
    bought = in_service(service, name, custom[0].arn)
    wait_for(lambda: deployment()["status"] == "Active", SECONDS, "the deployment to be Active")
    done = Event()

    def keep_asking(arn: str) -> list[str]:
        answers = [ask(arn)]
        while not done.is_set():
            answers.append(ask(arn))
        return [*answers, ask(arn)]

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        asking = [pool.submit(keep_asking, arn) for arn in (deployed, bought)]
        stack.callback(done.set)
        streams = []
        for arn in (deployed, bought):
            streamed = runtime.invoke_model_with_response_stream(modelId=arn, body=body(LONG))
            events = stack.enter_context(closing(streamed["body"]))
            chunks = (json.loads(event["chunk"]["bytes"])["outputText"] for event in events)
            streams.append((next(chunks), chunks))
        bedrock.update_custom_model_deployment(**named, modelArn=custom[1].arn)
        bedrock.update_provisioned_model_throughput(
            provisionedModelId=name, desiredModelId=custom[1].arn
        )
        wait_for(are_moved, SECONDS, "both updates")
        done.set()
        for first, rest in streams:
            assert first + "".join(rest) == whole, (
                "what has begun ends with the model it began with"
            )
        for each in asking:
            answers = each.result(SECONDS)
            assert set(answers) <= {old, new}
            assert answers == sorted(answers, key=[old, new].index), "and nobody goes back"
            assert answers[-1] == new
    assert deployment()["modelArn"] == throughput()["modelArn"] == custom[1].arn
    bedrock.delete_custom_model_deployment(**named)
