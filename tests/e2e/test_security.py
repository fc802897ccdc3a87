"""Who is not known, not in time or not allowed gets AWS's error, and nothing is done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from tests.e2e.service import (
    ACCOUNT,
    REGION,
    ROLE,
    TITAN,
    Service,
    job_request,
    keys,
    policy,
    refusal,
)

from outcrop.identity.credentials import Credentials
from outcrop.wire import sigv4

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def _names(service: Service, name: str) -> list[str]:
    listed = service.client("bedrock").list_model_customization_jobs(nameContains=name)
    return [item["jobName"] for item in listed["modelCustomizationJobSummaries"]]


def _create(service: Service, bucket: str, name: str, credentials: Credentials) -> Any:
    bedrock = service.client("bedrock", credentials=credentials, attempts=1)
    return bedrock.create_model_customization_job(**job_request(bucket, name))


# --- signatures -----------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused(service: Service, bucket: str, name: str) -> None:
    wrong = replace(service.owner, secret_access_key="w" * 40)
    error = refusal(lambda: _create(service, bucket, name, wrong))
    assert (error.code, error.status) == ("InvalidSignatureException", 403)
    s3 = service.client("s3", credentials=wrong, attempts=1)
    error = refusal(lambda: s3.put_object(Bucket=bucket, Key="new", Body=b"x"))
    assert (error.code, error.status) == ("SignatureDoesNotMatch", 403)
    assert service.owner.secret_access_key not in error.message
    assert _names(service, name) == []
    assert "new" not in keys(service, bucket)


def test_an_unknown_key_is_refused(service: Service, bucket: str, name: str) -> None:
    unknown = replace(service.owner, access_key_id="AKIA" + "A" * 16)
    error = refusal(lambda: _create(service, bucket, name, unknown))
    assert (error.code, error.status) == ("UnrecognizedClientException", 403)
    assert error.message == "The security token included in the request is invalid."
    s3 = service.client("s3", credentials=unknown, attempts=1)
    error = refusal(lambda: s3.delete_object(Bucket=bucket, Key="train.jsonl"))
    assert (error.code, error.status) == ("InvalidAccessKeyId", 403)
    sts = service.client("sts", credentials=unknown, attempts=1)
    error = refusal(sts.get_caller_identity)
    assert error.status == 403
    assert _names(service, name) == []
    assert "train.jsonl" in keys(service, bucket)


def _send(
    service: Service,
    path: str,
    body: bytes,
    *,
    when: datetime,
    method: str = "POST",
    scope: str = "bedrock",
) -> httpx.Response:
    """Send a request that is signed as of `when`, with the owner's real secret."""
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": urlsplit(service.url).netloc}
    owner = service.owner
    signed = sigv4.sign_headers(
        method,
        path,
        "",
        headers,
        access_key_id=owner.access_key_id,
        secret_access_key=owner.secret_access_key,
        region=REGION,
        service=scope,
        payload_hash=digest,
        now=when,
    )
    return httpx.request(
        method,
        service.url + path,
        content=body,
        headers={**headers, **signed},
        timeout=60,
        trust_env=False,
    )


@pytest.mark.parametrize(
    "age", [timedelta(minutes=16), timedelta(days=3), -timedelta(minutes=16)], ids=str
)
def test_a_signature_of_another_time_is_refused(
    service: Service, bucket: str, name: str, age: timedelta
) -> None:
    body = json.dumps(job_request(bucket, name)).encode()
    reply = _send(service, "/model-customization-jobs", body, when=datetime.now(UTC) - age)
    assert reply.status_code == 403
    assert reply.headers["x-amzn-errortype"].startswith("InvalidSignatureException")
    wording = "Signature expired" if age > timedelta(0) else "Signature not yet current"
    assert wording in reply.json()["message"]
    assert _names(service, name) == []

    path = f"/{bucket}/new"
    reply = _send(service, path, b"x", when=datetime.now(UTC) - age, method="PUT", scope="s3")
    assert reply.status_code == 403
    assert "<Code>RequestTimeTooSkewed</Code>" in reply.text
    assert "new" not in keys(service, bucket)


def test_a_signature_holds_for_its_body_and_path_only(
    service: Service, bucket: str, name: str
) -> None:
    body = json.dumps(job_request(bucket, name)).encode()
    reply = _send(service, "/model-customization-jobs", body, when=datetime.now(UTC))
    assert reply.status_code == 201, "the request itself is good"
    service.client("bedrock").stop_model_customization_job(jobIdentifier=name)
    sent = reply.request
    other = body.replace(name.encode(), f"{name}-other".encode())
    for url, content in ((sent.url, other), (f"{service.url}/custom-models", body)):
        headers = {key: sent.headers[key] for key in ("host", "x-amz-date", "authorization")}
        forged = httpx.post(url, content=content, headers=headers, trust_env=False)
        assert forged.status_code == 403
        assert forged.headers["x-amzn-errortype"].startswith("InvalidSignatureException")
    assert _names(service, name) == [name]


@pytest.mark.parametrize(
    ("method", "path", "refusal"),
    [
        ("POST", "/model-customization-jobs", "MissingAuthenticationTokenException"),
        ("GET", "/custom-models", "MissingAuthenticationTokenException"),
        (
            "DELETE",
            f"/custom-models/{quote('tuned-model')}",
            "MissingAuthenticationTokenException",
        ),
        ("POST", f"/model/{quote(TITAN, safe='')}/invoke", "MissingAuthenticationTokenException"),
        ("GET", "/", "<Code>AccessDenied</Code>"),
        ("GET", "/bucket/key", "<Code>AccessDenied</Code>"),
    ],
)
def test_an_unsigned_request_is_refused_in_its_own_protocol(
    service: Service, method: str, path: str, refusal: str
) -> None:
    reply = httpx.request(method, service.url + path, content=b"{}", trust_env=False)
    assert reply.status_code == 403
    assert refusal in reply.headers.get("x-amzn-errortype", "") + reply.text


def test_another_region_is_refused(service: Service) -> None:
    import boto3

    elsewhere = boto3.client(
        "bedrock",
        endpoint_url=service.url,
        region_name="eu-central-1",
        aws_access_key_id=service.owner.access_key_id,
        aws_secret_access_key=service.owner.secret_access_key,
    )
    error = refusal(elsewhere.list_custom_models)
    assert error.status == 403
    assert REGION in error.message
    elsewhere.close()


# --- permissions ----------------------------------------------------------------------------------


def test_a_user_without_permissions_is_denied_in_awss_words(
    service: Service, bucket: str, name: str
) -> None:
    user = service.user(name)
    arn = f"arn:aws:iam::{ACCOUNT}:user/{name}"
    error = refusal(lambda: _create(service, bucket, name, user))
    assert (error.code, error.status) == ("AccessDeniedException", 403)
    action = "bedrock:CreateModelCustomizationJob"
    assert error.message.startswith(f"User: {arn} is not authorized to perform: {action} on")
    assert f"because no identity-based policy allows the {action} action" in error.message
    assert _names(service, name) == []

    runtime = service.client("bedrock-runtime", credentials=user, attempts=1)
    error = refusal(lambda: runtime.invoke_model(modelId=TITAN, body=b"{}"))
    assert (error.code, error.status) == ("AccessDeniedException", 403)
    assert f"foundation-model/{TITAN}" in error.message

    s3 = service.client("s3", credentials=user, attempts=1)
    for call in (
        lambda: s3.put_object(Bucket=bucket, Key="new", Body=b"x"),
        lambda: s3.get_object(Bucket=bucket, Key="train.jsonl"),
        lambda: s3.delete_object(Bucket=bucket, Key="train.jsonl"),
        lambda: s3.create_bucket(Bucket=f"{name}-of-nobody"),
    ):
        error = refusal(call)
        assert (error.code, error.status) == ("AccessDenied", 403)
        assert arn in error.message
    assert keys(service, bucket) == ["train.jsonl", "validation.jsonl"]
    assert service.client("sts", credentials=user).get_caller_identity()["Arn"] == arn


def test_a_user_needs_the_right_to_pass_the_role(service: Service, bucket: str, name: str) -> None:
    everything_of_bedrock = policy({"Effect": "Allow", "Action": "bedrock:*", "Resource": "*"})
    user = service.user(name, everything_of_bedrock)
    error = refusal(lambda: _create(service, bucket, name, user))
    assert (error.code, error.status) == ("AccessDeniedException", 403)
    assert "iam:PassRole" in error.message
    assert ROLE in error.message
    assert _names(service, name) == []


def test_an_explicit_deny_wins(service: Service, name: str) -> None:
    user = service.user(
        name,
        policy({"Effect": "Allow", "Action": "*", "Resource": "*"}),
        policy({"Effect": "Deny", "Action": "bedrock:Delete*", "Resource": "*"}),
    )
    bedrock = service.client("bedrock", credentials=user)
    assert "modelSummaries" in bedrock.list_custom_models()
    error = refusal(lambda: bedrock.delete_custom_model(modelIdentifier="tuned-model"))
    assert (error.code, error.status) == ("AccessDeniedException", 403)
    assert "with an explicit deny in an identity-based policy" in error.message


def test_who_may_not_look_does_not_learn_whether_a_job_exists(service: Service, name: str) -> None:
    user = service.user(name)
    bedrock = service.client("bedrock", credentials=user, attempts=1)
    own = service.client("outcrop", credentials=user, attempts=1)
    calls = (
        lambda: bedrock.get_model_customization_job(jobIdentifier="no-such-job"),
        lambda: bedrock.stop_model_customization_job(jobIdentifier="no-such-job"),
        lambda: bedrock.get_custom_model(modelIdentifier="no-such-model"),
        lambda: own.get_job_progress(jobIdentifier="no-such-job"),
    )
    for call in calls:
        error = refusal(call)
        assert (error.code, error.status) == ("AccessDeniedException", 403)
