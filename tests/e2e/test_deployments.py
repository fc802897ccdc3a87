"""A deployment on the real service: active by itself, and moved while somebody keeps asking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from tests.assets.smollm2 import smollm2_folder
from tests.e2e.service import Service, wait_for
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


def test_a_deployment_becomes_active_and_moves_while_it_is_asked_without_a_pause(
    service: Service, custom: list[NewCustomModel], name: str
) -> None:
    bedrock, runtime = service.client("bedrock"), service.client("bedrock-runtime", attempts=8)

    def body(tokens: int) -> str:
        options = {"maxTokenCount": tokens, "temperature": 0}
        return json.dumps({"inputText": "Count.", "textGenerationConfig": options})

    def ask(model: str, tokens: int = 8) -> str:
        answer = runtime.invoke_model(modelId=model, body=body(tokens))
        return str(json.loads(answer["body"].read())["results"][0]["outputText"])

    old, new = (ask(each.arn) for each in custom)
    whole = ask(custom[0].arn, LONG)
    assert old != new
    arn = bedrock.create_custom_model_deployment(modelDeploymentName=name, modelArn=custom[0].arn)[
        "customModelDeploymentArn"
    ]
    named = {"customModelDeploymentIdentifier": arn}
    assert ask(arn) == old, "also before it is Active"

    def state() -> dict[str, Any]:
        return dict(bedrock.get_custom_model_deployment(**named))

    wait_for(lambda: state()["status"] == "Active", SECONDS, "the deployment to be Active")
    done = Event()

    def keep_asking() -> list[str]:
        answers = [ask(arn)]
        while not done.is_set():
            answers.append(ask(arn))
        return [*answers, ask(arn)]

    streamed = runtime.invoke_model_with_response_stream(modelId=arn, body=body(LONG))
    with closing(streamed["body"]) as events, ThreadPoolExecutor(1) as pool:
        chunks = (json.loads(event["chunk"]["bytes"])["outputText"] for event in events)
        text = next(chunks)
        asking = pool.submit(keep_asking)
        try:
            bedrock.update_custom_model_deployment(**named, modelArn=custom[1].arn)
            wait_for(
                lambda: state()["updateDetails"]["updateStatus"] == "UpdateCompleted",
                *(SECONDS, "the update"),
            )
        finally:
            done.set()
        text += "".join(chunks)
        answers = asking.result(SECONDS)
    assert text == whole, "what has begun ends with the model that it began with"
    assert set(answers) <= {old, new}
    assert answers == sorted(answers, key=[old, new].index), "and nobody goes back"
    assert (answers[-1], ask(arn), state()["modelArn"]) == (new, new, custom[1].arn)
    bedrock.delete_custom_model_deployment(**named)
