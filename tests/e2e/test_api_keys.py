"""API keys: OpenAI's client over plain http, and every client over TLS."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, InvalidEndpointConfigurationError
from tests.assets.smollm2 import smollm2_folder
from tests.e2e.service import LLAMA, REGION, TITAN, Service

from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.identity.api_keys import load_or_make_api_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def _key(service: Service) -> str:
    return load_or_make_api_key(service.settings).key


def _printed(service: Service) -> dict[str, str]:
    """Return the environment of a program after `eval "$(outcrop env --bearer)"`."""
    command = (sys.executable, "-m", "outcrop", "env", "--bearer", "--shell", "json")
    done = subprocess.run(
        (*command, "--data-dir", str(service.data_dir)), capture_output=True, check=True
    )
    printed = json.loads(done.stdout)
    kept = {name: text for name, text in os.environ.items() if name not in printed}
    return {**kept, **{name: text for name, text in printed.items() if text is not None}}


# --- plain http -----------------------------------------------------------------------------------


def test_openais_client_is_answered_by_the_real_model(service: Service) -> None:
    with openai.OpenAI(api_key=_key(service), base_url=f"{service.url}/v1") as client:
        asked: Any = {"model": LLAMA, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**asked, logprobs=True)
        with client.chat.completions.create(**asked, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    text = whole.choices[0].message.content
    assert text
    assert "".join(pieces) == text
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 16
    assert whole.choices[0].logprobs is not None
    assert all(item.logprob <= 0 for item in whole.choices[0].logprobs.content or ())


def test_a_completion_of_the_rendered_prompt_and_invoke_model_say_the_same(
    service: Service,
) -> None:
    renderer = Renderer(smollm2_folder())
    ids = renderer.render_prompt((Message("user", "Paris is"),))
    body = {"prompt": "Paris is", "max_gen_len": 12, "temperature": 0}
    answer = service.client("bedrock-runtime").invoke_model(modelId=LLAMA, body=json.dumps(body))
    expected = json.loads(answer["body"].read())["generation"]
    with openai.OpenAI(api_key=_key(service), base_url=f"{service.url}/v1") as client:
        found = client.completions.create(model=LLAMA, prompt=ids, max_tokens=12, temperature=0)
        raw = client.completions.create(
            model=LLAMA, prompt="Paris is", max_tokens=12, temperature=0
        )
    assert found.choices[0].text == expected
    assert raw.usage is not None
    assert raw.usage.prompt_tokens == len(renderer.tokenizer.encode("Paris is"))


def test_a_custom_model_is_asked_by_its_throughput(service: Service, throughput: str) -> None:
    with openai.OpenAI(api_key=_key(service), base_url=f"{service.url}/v1") as client:
        assert throughput in {model.id for model in client.models.list()}
        answer = client.chat.completions.create(model=throughput, messages=QUESTION, max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_botocore_sends_no_key_over_plain_http(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reason for --tls; where this fails, docs/operations.md has to change.
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", _key(service))
    client = boto3.client("bedrock", endpoint_url=service.url, region_name=REGION)
    try:
        with pytest.raises(InvalidEndpointConfigurationError):
            client.list_foundation_models()
    finally:
        client.close()


def test_a_key_opens_neither_s3_nor_another_service(service: Service, bucket: str) -> None:
    headers = {"authorization": f"Bearer {_key(service)}"}
    with httpx.Client(base_url=service.url, headers=headers, trust_env=False) as http:
        assert http.get("/foundation-models").status_code == 200
        for path in ("/", f"/{bucket}", f"/{bucket}/train.jsonl"):
            assert http.get(path).status_code in (403, 404)
        identity = {"Action": "GetCallerIdentity", "Version": "2011-06-15"}
        assert http.post("/", data=identity).status_code in (403, 404)


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that speaks https."""
    running = Service(tmp_path_factory.mktemp("tls") / "data", OUTCROP_TLS="true")
    running.start()
    yield running
    running.stop()


@pytest.fixture
def printed(safe: Service, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `outcrop env --bearer` prints, in this process's environment."""
    found = _printed(safe)
    for name in set(os.environ) - set(found):
        monkeypatch.delenv(name)
    for name, text in found.items():
        monkeypatch.setenv(name, text)
    return found


def test_the_ready_line_says_https(safe: Service, printed: dict[str, str]) -> None:
    assert safe.url.startswith("https://127.0.0.1:")
    assert printed["AWS_ENDPOINT_URL"] == safe.url
    assert printed["OPENAI_BASE_URL"] == f"{safe.url}/v1"


def test_unmodified_boto3_sends_the_key_over_tls(safe: Service, printed: dict[str, str]) -> None:
    config = Config(retries={"total_max_attempts": 3}, read_timeout=120)
    bedrock, runtime = (
        boto3.client(name, config=config) for name in ("bedrock", "bedrock-runtime")
    )
    sent: list[str] = []
    for client in (bedrock, runtime):
        client.meta.events.register(
            "before-send", lambda request, **_: sent.append(request.headers["Authorization"])
        )
    try:
        listed = bedrock.list_foundation_models()["modelSummaries"]
        assert TITAN in {item["modelId"] for item in listed}
        body = json.dumps({"inputText": "Hello", "textGenerationConfig": {"maxTokenCount": 4}})
        answer = runtime.invoke_model(modelId=TITAN, body=body)
        assert json.loads(answer["body"].read())["results"]
    finally:
        bedrock.close()
        runtime.close()
    assert {_text(value) for value in sent} == {f"Bearer {_key(safe)}"}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_s3_works_over_tls_in_all_the_ways_that_boto3_sends(
    safe: Service, printed: dict[str, str], tmp_path: Path
) -> None:
    s3 = boto3.client("s3")
    content = bytes(range(256)) * 1000
    file = tmp_path / "file"
    file.write_bytes(content)
    try:
        s3.create_bucket(Bucket="over-tls")
        s3.put_object(Bucket="over-tls", Key="bytes", Body=content)
        with file.open("rb") as stream:  # in chunks, with the checksum after them
            s3.put_object(Bucket="over-tls", Key="stream", Body=stream)
        s3.upload_file(str(file), "over-tls", "upload")
        for key in ("bytes", "stream", "upload"):
            assert s3.get_object(Bucket="over-tls", Key=key)["Body"].read() == content
        url = s3.generate_presigned_url("get_object", Params={"Bucket": "over-tls", "Key": "bytes"})
        trusted = ssl.create_default_context(cafile=printed["AWS_CA_BUNDLE"])
        with httpx.Client(verify=trusted, trust_env=False) as http:
            assert http.get(url).content == content
    finally:
        s3.close()


def test_unmodified_openai_client_works_over_tls(safe: Service, printed: dict[str, str]) -> None:
    with openai.OpenAI() as client:
        assert TITAN in {model.id for model in client.models.list()}
        with client.chat.completions.create(
            model=LLAMA, messages=QUESTION, max_tokens=8, stream=True
        ) as stream:
            *_, last = list(stream)
    assert last.choices[0].finish_reason in ("stop", "length")


def test_signed_requests_work_over_tls_too(safe: Service, printed: dict[str, str]) -> None:
    os.environ.pop("AWS_BEARER_TOKEN_BEDROCK")
    runtime = boto3.client("bedrock-runtime")
    try:
        body = json.dumps({"inputText": "Hello", "textGenerationConfig": {"maxTokenCount": 4}})
        assert runtime.invoke_model(modelId=TITAN, body=body)["body"].read()
    finally:
        runtime.close()


def test_a_wrong_key_is_refused_over_tls(
    safe: Service, printed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "ABSKwrong")
    bedrock = boto3.client("bedrock")
    try:
        with pytest.raises(ClientError, match="make sure your API Key is valid") as refused:
            bedrock.list_foundation_models()
    finally:
        bedrock.close()
    assert refused.value.response["Error"]["Code"] == "AccessDeniedException"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_who_does_not_trust_the_authority_is_not_served(safe: Service) -> None:
    with httpx.Client(trust_env=False) as http, pytest.raises(httpx.ConnectError, match="CERT"):
        http.get(f"{safe.url}/healthz")


def test_keys_and_certificates_are_for_their_owner_only(safe: Service) -> None:
    secrets = safe.data_dir / "secrets"
    files = [secrets / "api-key.json", *(secrets / "tls").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((secrets / "tls").stat().st_mode) == 0o700


def test_after_a_new_start_clients_need_nothing_new(safe: Service, printed: dict[str, str]) -> None:
    before = Path(printed["AWS_CA_BUNDLE"]).read_bytes()
    safe.stop()
    safe.start()
    after = _printed(safe)
    assert Path(after["AWS_CA_BUNDLE"]).read_bytes() == before
    assert after["OPENAI_API_KEY"] == printed["OPENAI_API_KEY"]
    trusted = ssl.create_default_context(cafile=after["AWS_CA_BUNDLE"])
    with httpx.Client(verify=trusted, trust_env=False) as http:
        assert http.get(f"{safe.url}/healthz").json() == {"status": "ok"}
