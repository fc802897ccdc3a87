"""Identifiers of resources: made and taken apart here only.

Forms follow the patterns of botocore's `bedrock` model: ids are 12 characters of [a-z0-9], the
account field of a foundation model's ARN is empty, and a customized model's ARN names the base
model it came from.
"""

from __future__ import annotations

import re
import secrets
import uuid
from dataclasses import dataclass

_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_LENGTH = 12
IMPORTED_FOLDER = "models/imported"
"""Where weights that were brought in lie, in the data directory."""
_IMPORTED_KEY = re.compile(r"imported\.([a-z0-9]{12})-([0-9]{1,9})")


def new_id() -> str:
    """Return 12 random characters of [a-z0-9] (62 bits), the form of ids on the wire."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(ID_LENGTH))


def new_request_id() -> str:
    """Return the id that names one request in its answer and in the logs."""
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Arn:
    """`arn:partition:service:region:account:type/id`, where the id may hold slashes."""

    partition: str
    service: str
    region: str
    account: str
    resource_type: str
    resource_id: str

    def __str__(self) -> str:
        return (
            f"arn:{self.partition}:{self.service}:{self.region}:{self.account}:"
            f"{self.resource_type}/{self.resource_id}"
        )


def parse_arn(text: str) -> Arn | None:
    """Take an ARN apart, or return None where the text is not one with a `type/id` resource."""
    parts = text.split(":", 5)
    if len(parts) != 6 or parts[0] != "arn" or "/" not in parts[5]:
        return None
    resource_type, resource_id = parts[5].split("/", 1)
    return Arn(parts[1], parts[2], parts[3], parts[4], resource_type, resource_id)


def foundation_model_arn(region: str, model_id: str) -> str:
    """Return the ARN of a base model; its account field is empty."""
    return f"arn:aws:bedrock:{region}::foundation-model/{model_id}"


def customization_job_arn(region: str, account: str, base_model_id: str, job_id: str) -> str:
    """Return a job's ARN; `base_model_id` is the context-suffixed id."""
    return f"arn:aws:bedrock:{region}:{account}:model-customization-job/{base_model_id}/{job_id}"


def data_task_arn(region: str, account: str, task_id: str) -> str:
    """Return the ARN of a data task; Bedrock has none of these, so the form is ours."""
    return f"arn:aws:bedrock:{region}:{account}:data-task/{task_id}"


def batch_job_arn(region: str, account: str, job_id: str) -> str:
    """Return the ARN of a batch inference job."""
    return f"arn:aws:bedrock:{region}:{account}:model-invocation-job/{job_id}"


def model_export_arn(region: str, account: str, export_id: str) -> str:
    """Return the ARN of an export; the form is ours."""
    return f"arn:aws:bedrock:{region}:{account}:model-export/{export_id}"


def checkpoint_model_arn(region: str, account: str, task_id: str) -> str:
    """Return the ARN of what makes a model of a checkpoint; the form is ours."""
    return f"arn:aws:bedrock:{region}:{account}:checkpoint-model/{task_id}"


def custom_model_arn(region: str, account: str, base_model_id: str, model_id: str) -> str:
    """Return a custom model's ARN; the human name is never part of it."""
    return f"arn:aws:bedrock:{region}:{account}:custom-model/{base_model_id}/{model_id}"


def created_model_arn(region: str, account: str, model_id: str) -> str:
    """Return the ARN of a custom model that was made from weights in S3, by no job of its owner."""
    return f"arn:aws:bedrock:{region}:{account}:custom-model/imported/{model_id}"


def import_job_arn(region: str, account: str, job_id: str) -> str:
    """Return the ARN of a model import job."""
    return f"arn:aws:bedrock:{region}:{account}:model-import-job/{job_id}"


def imported_model_arn(region: str, account: str, model_id: str) -> str:
    """Return the ARN of an imported model."""
    return f"arn:aws:bedrock:{region}:{account}:imported-model/{model_id}"


def copy_job_arn(region: str, account: str, job_id: str) -> str:
    """Return the ARN of a model copy job, which is of the region that the copy goes to."""
    return f"arn:aws:bedrock:{region}:{account}:model-copy-job/{job_id}"


def imported_key(model_id: str, fence: int) -> str:
    """Return the key of weights that an attempt brings in; it is the id of their base model too.

    It has the form of a base model's id, because it stands in the ARNs of jobs and custom models
    that are made from it.
    """
    return f"imported.{model_id}-{fence}"


def is_imported(key: str) -> bool:
    """Return whether a key of weights, or the id of a base model, is of weights brought in."""
    return _IMPORTED_KEY.fullmatch(key) is not None


def imported_path(key: str) -> str:
    """Return the folder of such a key, relative to the data directory."""
    found = _IMPORTED_KEY.fullmatch(key)
    assert found is not None, "only for keys of imported weights"
    return f"{IMPORTED_FOLDER}/{found[1]}/{found[2]}"


def provisioned_model_arn(region: str, account: str, provisioned_id: str) -> str:
    """Return the ARN of a provisioned throughput."""
    return f"arn:aws:bedrock:{region}:{account}:provisioned-model/{provisioned_id}"


def deployment_arn(region: str, account: str, deployment_id: str) -> str:
    """Return the ARN of a custom model deployment."""
    return f"arn:aws:bedrock:{region}:{account}:custom-model-deployment/{deployment_id}"


def inference_profile_arn(region: str, account: str, profile_id: str) -> str:
    """Return the ARN of an application inference profile."""
    return f"arn:aws:bedrock:{region}:{account}:application-inference-profile/{profile_id}"


def role_arn(account: str, name: str) -> str:
    """Return the ARN of a role."""
    return f"arn:aws:iam::{account}:role/{name}"


def user_arn(account: str, name: str) -> str:
    """Return the ARN of a user."""
    return f"arn:aws:iam::{account}:user/{name}"


@dataclass(frozen=True)
class S3Uri:
    """A bucket and a key; the key is "" where the URI names the bucket alone."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def join(self, name: str) -> S3Uri:
        """Return the URI of `name` below this one, with exactly one slash between."""
        prefix = self.key.rstrip("/")
        return S3Uri(self.bucket, f"{prefix}/{name}" if prefix else name)


_S3_URI = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(.*))?", re.DOTALL)


def parse_s3_uri(text: str) -> S3Uri | None:
    """Take `s3://bucket/key` apart, or return None where the text is not of that form."""
    found = _S3_URI.fullmatch(text)
    return S3Uri(found[1], found[2] or "") if found else None
