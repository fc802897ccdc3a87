"""Imported models through a real gateway and boto3: brought, asked in their dialects, copied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from botocore.exceptions import ClientError
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model
from tests.unit.api.runtime_gateway import ANSWER, Gateway, running_gateway
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, claimed

from outcrop.api.context import Services
from outcrop.data.records import Message
from outcrop.identity.api_keys import load_or_make_api_key
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, role_arn
from outcrop.jobs import copying, importing
from outcrop.jobs.attempt import StopFlag, run_attempt
from outcrop.models.artifact import folder_digest
from outcrop.serve.request import Generation, TokenLogprob
from outcrop.settings import Settings
from outcrop.store import jobs, models, servers
from outcrop.store.database import transaction
from outcrop.store.rows import Job

HOME, ABROAD = "us-east-1", "eu-west-1"
ROLE = role_arn(ACCOUNT, CUSTOMIZATION_ROLE)
PREFIX, RAW = f"s3://{BUCKET}/tiny", f"s3://{BUCKET}/raw/"
TEXT = "Héllo you"
KMS_KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{'a' * 36}"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    """A tiny Llama, below `raw/` without a chat template."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=400)
    content: dict[str, bytes] = {}
    for prefix, template in (("tiny", tiny.CHATML_TEMPLATE), ("raw", None)):
        tiny.write_tokenizer(folder, template, tiny.CHATML_TOKENS, eos="<|im_end|>")
        content |= {f"{prefix}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    return MemoryStore(**content, **{"train.jsonl": b"{}"})


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, objects: MemoryStore) -> Iterator[Gateway]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Services, "objects", property(lambda self: objects))
        folder = tmp_path_factory.mktemp("imported") / "data"
        with running_gateway(folder, regions=f"{ABROAD}, ap-south-1") as found:
            yield found


@pytest.fixture(autouse=True)
def _scripted(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER)


@pytest.fixture(scope="module")
def bedrock(gateway: Gateway) -> Any:
    return gateway.client(service="bedrock")


@pytest.fixture(scope="module")
def abroad(gateway: Gateway) -> Any:
    return gateway.client(service="bedrock", region=ABROAD)


@pytest.fixture(scope="module")
def runtime(gateway: Gateway) -> Any:
    return gateway.client()


def attempt(gateway: Gateway, arn: str, objects: MemoryStore) -> Job:
    """Run what a worker would run of a job, to its end."""
    with transaction(gateway.engine) as connection:
        live = next(job for job in jobs.live_jobs(connection) if arn.endswith(job.id))
        found = jobs.get_job_by_id(connection, live.id)
        assert found is not None
        job = claimed(connection, found)
    stages = {"import": importing.run_import, "creation": importing.run_creation}

    def run(settings: Settings, engine: Any, job: Job, stop: StopFlag) -> None:
        if job.kind == "copy":
            copying.run(settings, engine, job, stop)
        else:
            stages[job.kind](settings, engine, job, stop, objects=objects)

    run_attempt(gateway.settings, gateway.engine, job.id, job.fence, StopFlag(), run=run)
    with gateway.engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, job.id)
    assert ended is not None
    return ended


def serve(gateway: Gateway, weights: str) -> None:
    """Say that the scripted model server has these weights."""
    with transaction(gateway.engine) as connection:
        servers.want(connection, weights)
        servers.mark_starting(connection, weights, str(gateway.model.socket))
        servers.mark_ready(connection, weights, 1)


def bring(gateway: Gateway, bedrock: Any, objects: MemoryStore, name: str, uri: str) -> str:
    """Import a model to its end; returns its ARN."""
    made = bedrock.create_model_import_job(
        jobName=f"job-{name}",
        importedModelName=name,
        roleArn=ROLE,
        modelDataSource={"s3DataSource": {"s3Uri": uri}},
        jobTags=[{"key": "kind", "value": "job"}],
        importedModelTags=[{"key": "kind", "value": "model"}],
    )
    ended = attempt(gateway, made["jobArn"], objects)
    assert ended.failure_message is None
    found = bedrock.get_model_import_job(jobIdentifier=f"job-{name}")
    with gateway.engine.connect() as connection:
        now = jobs.get_job_by_id(connection, ended.id)
    assert now is not None
    serve(gateway, f"imported.{now.spec['importedModelId']}-1")
    return str(found["importedModelArn"])


@pytest.fixture(scope="module")
def arn(gateway: Gateway, bedrock: Any, objects: MemoryStore) -> str:
    return bring(gateway, bedrock, objects, "chatty", PREFIX)


@pytest.fixture(scope="module")
def raw_arn(gateway: Gateway, bedrock: Any, objects: MemoryStore) -> str:
    return bring(gateway, bedrock, objects, "raw", RAW)


def code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


def invoke(runtime: Any, model: str, **body: Any) -> dict[str, Any]:
    answer = runtime.invoke_model(modelId=model, body=json.dumps(body))
    found: dict[str, Any] = json.loads(answer["body"].read())
    return found


def stream(runtime: Any, model: str, **body: Any) -> list[dict[str, Any]]:
    answer = runtime.invoke_model_with_response_stream(modelId=model, body=json.dumps(body))
    return [json.loads(event["chunk"]["bytes"]) for event in answer["body"]]


# --- jobs and models ------------------------------------------------------------------------------


def test_an_import_job_is_described_and_listed_with_its_model(bedrock: Any, arn: str) -> None:
    job = bedrock.get_model_import_job(jobIdentifier="job-chatty")
    assert (job["status"], job["importedModelArn"]) == ("Completed", arn)
    assert job["modelDataSource"] == {"s3DataSource": {"s3Uri": PREFIX}}
    listed = bedrock.list_model_import_jobs(nameContains="chatty", statusEquals="Completed")
    assert [one["jobArn"] for one in listed["modelImportJobSummaries"]] == [job["jobArn"]]
    model = bedrock.get_imported_model(modelIdentifier="chatty")
    assert model["modelArn"] == arn
    assert (model["modelArchitecture"], model["instructSupported"]) == ("LlamaForCausalLM", True)
    assert model["customModelUnits"]["customModelUnitsVersion"] == "v1.0"
    assert (model["jobName"], model["jobArn"]) == ("job-chatty", job["jobArn"])
    names = [one["modelName"] for one in bedrock.list_imported_models()["modelSummaries"]]
    assert "chatty" in names
    for resource, kind in ((job["jobArn"], "job"), (arn, "model")):
        tags = bedrock.list_tags_for_resource(resourceARN=resource)["tags"]
        assert tags == [{"key": "kind", "value": kind}]


def test_a_repeated_token_returns_the_first_job_and_a_taken_name_is_refused(
    gateway: Gateway, bedrock: Any, arn: str
) -> None:
    request = {
        "jobName": "twice",
        "importedModelName": "twice",
        "roleArn": ROLE,
        "modelDataSource": {"s3DataSource": {"s3Uri": PREFIX}},
        "clientRequestToken": "t",
    }
    first = bedrock.create_model_import_job(**request)
    assert bedrock.create_model_import_job(**request)["jobArn"] == first["jobArn"]
    for taken in ("chatty", "twice"):
        with pytest.raises(ClientError, match="model name is currently in use") as refused:
            bedrock.create_model_import_job(
                **request
                | {
                    "jobName": "other",
                    "importedModelName": taken,
                    "clientRequestToken": f"u-{taken}",
                }
            )
        assert code(refused) == "ConflictException"
    with transaction(gateway.engine) as connection:
        (job,) = [one for one in jobs.live_jobs(connection) if first["jobArn"].endswith(one.id)]
        assert jobs.request_stop(connection, job.id)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modelDataSource": {"s3DataSource": {"s3Uri": f"s3://{BUCKET}/none"}}}, "no weights"),
        ({"modelDataSource": {"s3DataSource": {"s3Uri": "s3://nowhere/tiny"}}}, "does not exist"),
        ({"roleArn": role_arn(ACCOUNT, "nobody")}, "role .*nobody does not exist"),
        ({"importedModelKmsKeyId": KMS_KEY}, "importedModelKmsKeyId is not supported yet"),
    ],
)
def test_what_is_known_to_fail_is_refused_at_once(
    changes: dict[str, Any], says: str, bedrock: Any
) -> None:
    request = {
        "jobName": "bad",
        "importedModelName": "bad",
        "roleArn": ROLE,
        "modelDataSource": {"s3DataSource": {"s3Uri": PREFIX}},
    }
    with pytest.raises(ClientError, match=says) as refused:
        bedrock.create_model_import_job(**{**request, **changes})
    assert code(refused) == "ValidationException"


def test_a_deleted_model_is_gone_with_its_files(
    gateway: Gateway, bedrock: Any, objects: MemoryStore
) -> None:
    arn = bring(gateway, bedrock, objects, "short-lived", PREFIX)
    folder = gateway.settings.data_dir / "models" / "imported" / arn.rpartition("/")[2]
    assert any(folder.iterdir())
    bedrock.delete_imported_model(modelIdentifier=arn)
    assert not any(folder.iterdir())
    for ask in (bedrock.get_imported_model, bedrock.delete_imported_model):
        with pytest.raises(ClientError) as refused:
            ask(modelIdentifier=arn)
        assert code(refused) == "ResourceNotFoundException"


def test_a_model_with_throughput_is_not_deleted(bedrock: Any, arn: str) -> None:
    bought = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName="mine", modelId=arn
    )
    found = bedrock.get_provisioned_model_throughput(provisionedModelId="mine")
    listed = bedrock.list_provisioned_model_throughputs(modelArnEquals=arn)
    assert len(listed["provisionedModelSummaries"]) == 1
    assert (found["modelArn"], found["foundationModelArn"]) == (arn, arn)
    with pytest.raises(ClientError, match="in use by provisioned throughput mine"):
        bedrock.delete_imported_model(modelIdentifier=arn)
    bedrock.delete_provisioned_model_throughput(provisionedModelId=bought["provisionedModelArn"])


# --- asking ---------------------------------------------------------------------------------------


def test_bedrocks_completion_goes_on_with_the_prompt_as_it_stands(
    gateway: Gateway, runtime: Any, arn: str
) -> None:
    answer = invoke(runtime, arn, prompt="<|im_start|>user\nHi", max_gen_len=9, temperature=0)
    assert answer == {
        "generation": TEXT,
        "prompt_token_count": 7,
        "generation_token_count": 4,
        "stop_reason": "stop",
    }
    (asked,) = gateway.model.requests
    assert (asked.prompt, asked.spells_control) == ("<|im_start|>user\nHi", True)
    assert (asked.messages, asked.adapter, asked.sampling.max_tokens) == ((), None, 9)
    assert asked.owner.model == arn


def test_log_probabilities_come_with_bedrocks_completion(
    gateway: Gateway, runtime: Any, arn: str
) -> None:
    token = TokenLogprob("a", -0.5, (("a", -0.5), ("b", -1.5)))
    gateway.model.script(Generation("a", 1, 1, "length", logprobs=(token,)))
    answer = invoke(runtime, arn, prompt="x", max_gen_len=1, logprobs=2)
    assert answer["logprobs"] == [
        {"token": "a", "logprob": -0.5, "top_logprobs": {"a": -0.5, "b": -1.5}}
    ]


def test_openais_completion_is_chosen_by_max_tokens(
    gateway: Gateway, runtime: Any, arn: str
) -> None:
    answer = invoke(runtime, arn, prompt="Hi", max_tokens=9, stop="x", n=2)
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}
    assert gateway.model.requests[0].sampling.stop == ("x",)


def test_openais_chat_is_chosen_by_messages_and_rendered_by_the_template(
    gateway: Gateway, runtime: Any, arn: str
) -> None:
    answer = invoke(runtime, arn, messages=[{"role": "user", "content": "Hi"}], max_tokens=9)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == TEXT
    (asked,) = gateway.model.requests
    assert (asked.messages, asked.prompt) == ((Message("user", "Hi"),), None)


def test_streams_come_in_the_chunks_of_each_dialect(runtime: Any, arn: str) -> None:
    chunks = stream(runtime, arn, prompt="Hi", max_gen_len=9)
    assert "".join(chunk["generation"] for chunk in chunks) == TEXT
    assert chunks[-1]["stop_reason"] == "stop"
    assert chunks[-1]["amazon-bedrock-invocationMetrics"]["outputTokenCount"] == 4
    chunks = stream(runtime, arn, prompt="Hi", max_tokens=9, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    chunks = stream(runtime, arn, messages=[{"role": "user", "content": "Hi"}])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, r"one of the keys \[messages\] and \[prompt\] must be there"),
        ({"prompt": "a", "max_gen_len": 0}, "max_gen_len"),
        ({"prompt": "a", "max_gen_len": 1000}, "exceeds the model limit of 512"),
        ({"prompt": "a", "max_tokens": 5, "echo": True}, "'echo' is not supported"),
        ({"prompt": ["a", "b"], "max_tokens": 5}, "'prompt' must be one text"),
        ({"messages": [], "max_tokens": 5}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "a"}], "guided_json": {}}, "'guided_json' is"),
        (
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json"}},
            "'response_format' is not supported",
        ),
    ],
)
def test_a_body_of_no_dialect_is_refused_by_its_key(
    body: dict[str, Any], says: str, runtime: Any, arn: str
) -> None:
    with pytest.raises(ClientError, match=says) as refused:
        invoke(runtime, arn, **body)
    assert code(refused) == "ValidationException"


def test_converse_counting_and_the_openai_door_take_the_same_way(
    gateway: Gateway, runtime: Any, arn: str
) -> None:
    hello = [{"role": "user", "content": [{"text": "Hi"}]}]
    answer = runtime.converse(
        modelId=arn, messages=hello, inferenceConfig={"maxTokens": 5, "stopSequences": ["x"]}
    )
    assert answer["output"]["message"]["content"] == [{"text": TEXT}]
    assert gateway.model.requests[-1].sampling.stop == ("x",)
    assert runtime.count_tokens(modelId=arn, input={"converse": {"messages": hello}}) is not None
    assert gateway.model.counted == [(Message("user", "Hi"),)]
    body = json.dumps({"prompt": "<|im_end|>", "max_gen_len": 5})
    runtime.count_tokens(modelId=arn, input={"invokeModel": {"body": body}})
    assert gateway.model.counted_prompts == [None, "<|im_end|>"]
    key = load_or_make_api_key(gateway.settings).key
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        said = client.chat.completions.create(
            model=arn, messages=[{"role": "user", "content": "Hi"}]
        )
        assert said.choices[0].message.content == TEXT
        assert arn in [model.id for model in client.models.list()]


def test_a_model_without_a_template_takes_prompts_and_refuses_conversations(
    runtime: Any, bedrock: Any, raw_arn: str
) -> None:
    assert not bedrock.get_imported_model(modelIdentifier=raw_arn)["instructSupported"]
    assert invoke(runtime, raw_arn, prompt="Hi")["generation"] == TEXT
    hello = [{"role": "user", "content": [{"text": "Hi"}]}]
    with pytest.raises(ClientError, match="it was imported without a chat template"):
        runtime.converse(modelId=raw_arn, messages=hello)
    with pytest.raises(ClientError, match="it was imported without a chat template"):
        invoke(runtime, raw_arn, messages=[{"role": "user", "content": "Hi"}])


def test_an_imported_model_is_the_base_of_a_customization_job(
    gateway: Gateway, bedrock: Any, objects: MemoryStore
) -> None:
    arn = bring(gateway, bedrock, objects, "parent", PREFIX)
    made = bedrock.create_model_customization_job(
        jobName="over-imported",
        customModelName="over-imported",
        roleArn=ROLE,
        baseModelIdentifier=arn,
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/out"},
        hyperParameters={"epochCount": "2"},
    )
    job = bedrock.get_model_customization_job(jobIdentifier=made["jobArn"])
    assert job["baseModelArn"] == arn
    with pytest.raises(ClientError, match="in use by model customization job over-imported"):
        bedrock.delete_imported_model(modelIdentifier="parent")
    with transaction(gateway.engine) as connection:
        found = jobs.get_job_by_id(connection, made["jobArn"].rpartition("/")[2])
        assert found is not None
        weights = found.spec["weights"]
        needed = f"models/imported/{arn.rpartition('/')[2]}/1"
        assert (found.spec["baseModelId"], needed in models.artifact_paths(connection)) == (
            weights,
            True,
        )
        assert jobs.request_stop(connection, found.id)
    assert (gateway.settings.data_dir / needed).is_dir()


# --- custom models of weights in S3, and copies ---------------------------------------------------


def create_custom(gateway: Gateway, bedrock: Any, objects: MemoryStore, name: str) -> str:
    made = bedrock.create_custom_model(
        modelName=name,
        modelSourceConfig={"s3DataSource": {"s3Uri": PREFIX}},
        roleArn=ROLE,
        modelTags=[{"key": "team", "value": "a"}],
    )
    found = bedrock.get_custom_model(modelIdentifier=name)
    assert (found["modelStatus"], found["modelArn"]) == ("Creating", made["modelArn"])
    with gateway.engine.connect() as connection:
        row = models.find_model(connection, ACCOUNT, HOME, name)
    assert row is not None
    attempt(gateway, str(row.creation_job_id), objects)
    return str(made["modelArn"])


@pytest.fixture(scope="module")
def custom_arn(gateway: Gateway, bedrock: Any, objects: MemoryStore) -> str:
    return create_custom(gateway, bedrock, objects, "created")


def test_a_custom_model_is_made_of_weights_in_s3_and_used_like_a_trained_one(
    gateway: Gateway, bedrock: Any, runtime: Any, custom_arn: str
) -> None:
    found = bedrock.get_custom_model(modelIdentifier=custom_arn)
    assert (found["modelStatus"], found["customizationType"]) == ("Active", "IMPORTED")
    assert "jobArn" not in found
    assert bedrock.list_tags_for_resource(resourceARN=custom_arn)["tags"] == [
        {"key": "team", "value": "a"}
    ]
    with gateway.engine.connect() as connection:
        row = models.get_model(connection, ACCOUNT, HOME, custom_arn)
    assert row is not None
    serve(gateway, row.spec["weights"])
    answer = runtime.converse(
        modelId=custom_arn, messages=[{"role": "user", "content": [{"text": "Hi"}]}]
    )
    assert answer["output"]["message"]["content"] == [{"text": TEXT}]
    (asked,) = gateway.model.requests
    assert (asked.adapter, asked.owner.model) == (None, custom_arn)
    made = bedrock.create_model_customization_job(
        jobName="over-created",
        customModelName="over-created",
        roleArn=ROLE,
        baseModelIdentifier=custom_arn,
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/out"},
    )
    job = bedrock.get_model_customization_job(jobIdentifier=made["jobArn"])
    assert job["baseModelArn"] == custom_arn
    bedrock.stop_model_customization_job(jobIdentifier=made["jobArn"])


def test_a_model_that_is_creating_is_neither_used_nor_deleted(
    gateway: Gateway, bedrock: Any, runtime: Any, objects: MemoryStore
) -> None:
    made = bedrock.create_custom_model(
        modelName="slow", modelSourceConfig={"s3DataSource": {"s3Uri": PREFIX}}, roleArn=ROLE
    )
    listed = bedrock.list_custom_models(modelStatus="Creating")["modelSummaries"]
    assert [model["modelName"] for model in listed] == ["slow"]
    with pytest.raises(ClientError, match="slow is Creating"):
        bedrock.delete_custom_model(modelIdentifier="slow")
    with pytest.raises(ClientError, match="slow is still Creating") as refused:
        runtime.converse(
            modelId=made["modelArn"], messages=[{"role": "user", "content": [{"text": "Hi"}]}]
        )
    assert code(refused) == "ModelNotReadyException"
    kept = objects.content[S3Uri(BUCKET, "tiny/config.json")]
    objects.content[S3Uri(BUCKET, "tiny/config.json")] = b"{}"
    try:
        with gateway.engine.connect() as connection:
            row = models.find_model(connection, ACCOUNT, HOME, "slow")
        assert row is not None
        attempt(gateway, str(row.creation_job_id), objects)
    finally:
        objects.content[S3Uri(BUCKET, "tiny/config.json")] = kept
    failed = bedrock.get_custom_model(modelIdentifier="slow")
    assert failed["modelStatus"] == "Failed"
    assert "names the architecture None" in failed["failureMessage"]
    bedrock.delete_custom_model(modelIdentifier="slow")
    assert gateway.settings.data_dir.is_dir()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modelSourceConfig": None}, "Exactly one of modelSourceConfig and customModelDataSource"),
        ({"roleArn": None}, "roleArn must name the role"),
        ({"modelKmsKeyArn": KMS_KEY}, "modelKmsKeyArn is not"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(
    changes: dict[str, Any], says: str, bedrock: Any
) -> None:
    request = {
        "modelName": "bad",
        "modelSourceConfig": {"s3DataSource": {"s3Uri": PREFIX}},
        "roleArn": ROLE,
        **changes,
    }
    with pytest.raises(ClientError, match=says) as refused:
        bedrock.create_custom_model(**{name: one for name, one in request.items() if one})
    assert code(refused) == "ValidationException"


def test_a_copy_is_a_model_of_the_other_region_with_files_of_its_own(
    gateway: Gateway, bedrock: Any, abroad: Any, objects: MemoryStore
) -> None:
    source = create_custom(gateway, bedrock, objects, "to-copy")
    made = abroad.create_model_copy_job(
        sourceModelArn=source,
        targetModelName="copied",
        targetModelTags=[{"key": "from", "value": "home"}],
    )
    job = abroad.get_model_copy_job(jobArn=made["jobArn"])
    assert (job["status"], job["sourceModelName"]) == ("InProgress", "to-copy")
    bedrock.delete_custom_model(modelIdentifier=source)  # its files stay for the job
    assert attempt(gateway, made["jobArn"], objects).status == "completed"
    found = abroad.get_custom_model(modelIdentifier="copied")
    assert found["modelArn"] == job["targetModelArn"]
    assert found["modelArn"].startswith(f"arn:aws:bedrock:{ABROAD}:{ACCOUNT}:custom-model/imported")
    assert found["baseModelArn"] == found["modelArn"]
    assert abroad.list_tags_for_resource(resourceARN=found["modelArn"])["tags"] == [
        {"key": "from", "value": "home"}
    ]
    with gateway.engine.connect() as connection:
        row = models.get_model(connection, ACCOUNT, ABROAD, "copied")
    assert row is not None
    folder = gateway.settings.data_dir / row.artifact_path
    assert folder_digest(folder) == row.artifact_digest
    listed = abroad.list_model_copy_jobs(
        sourceModelArnEquals=source, sourceAccountEquals=ACCOUNT, targetModelNameContains="opi"
    )
    assert [one["jobArn"] for one in listed["modelCopyJobSummaries"]] == [made["jobArn"]]
    assert abroad.list_model_copy_jobs(sourceAccountEquals="1" * 12)["modelCopyJobSummaries"] == []


def test_a_copy_of_damaged_files_fails_with_the_reason(
    gateway: Gateway, bedrock: Any, abroad: Any, objects: MemoryStore
) -> None:
    source = create_custom(gateway, bedrock, objects, "damaged")
    made = abroad.create_model_copy_job(sourceModelArn=source, targetModelName="no-copy")
    with gateway.engine.connect() as connection:
        row = models.get_model(connection, ACCOUNT, HOME, source)
    assert row is not None
    (gateway.settings.data_dir / row.artifact_path / "config.json").write_text("{}")
    attempt(gateway, made["jobArn"], objects)
    job = abroad.get_model_copy_job(jobArn=made["jobArn"])
    assert job["status"] == "Failed"
    assert "are not those that were published" in job["failureMessage"]


def test_nothing_of_one_region_is_seen_in_another(
    gateway: Gateway, bedrock: Any, abroad: Any, arn: str, custom_arn: str
) -> None:
    assert abroad.list_imported_models()["modelSummaries"] == []
    assert abroad.list_model_import_jobs()["modelImportJobSummaries"] == []
    assert bedrock.list_model_copy_jobs()["modelCopyJobSummaries"] == []
    for ask, identifier in (
        (abroad.get_imported_model, arn),
        (abroad.get_imported_model, "chatty"),
        (abroad.get_custom_model, custom_arn),
        (abroad.get_custom_model, "created"),
    ):
        with pytest.raises(ClientError) as refused:
            ask(modelIdentifier=identifier)
        assert code(refused) == "ResourceNotFoundException"
    with pytest.raises(ClientError):
        invoke(gateway.client(region=ABROAD), arn, prompt="Hi")
    listed = abroad.list_foundation_models()["modelSummaries"]
    assert {model["modelArn"].split(":")[3] for model in listed} == {ABROAD}


def test_a_region_that_is_not_answered_for_is_refused_by_name(gateway: Gateway) -> None:
    with pytest.raises(ClientError, match=rf"answers for {HOME}, {ABROAD}, ap-south-1, not sa-"):
        gateway.client(service="bedrock", region="sa-east-1").list_custom_models()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("arn:aws:bedrock:us-west-9:123456789012:custom-model/imported/aaaaaaaaaaaa", "us-west-9"),
        ("arn:aws:bedrock:eu-west-1:123456789012:custom-model/imported/aaaaaaaaaaaa", "already"),
        ("arn:aws:bedrock:us-east-1:123456789012:custom-model/imported/aaaaaaaaaaaa", "not exist"),
        ("arn:aws:bedrock:us-east-1::foundation-model/a.b", "only custom models can be copied"),
    ],
)
def test_a_source_that_cannot_be_copied_is_refused(source: str, says: str, abroad: Any) -> None:
    with pytest.raises(ClientError, match=says):
        abroad.create_model_copy_job(sourceModelArn=source, targetModelName="x")
