"""What a modelId stands for: the forms of an id, and the weights and artifact behind each.

Looks an id up, asks whether the caller may use what it names, and returns a Target. Knows nothing
of model servers: it reads rows and the catalogue only.

Source: botocore's bedrock-runtime model, InvokeModelIdentifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.errors import (
    ModelErrorException,
    ModelNotReadyException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.ids import foundation_model_arn, parse_arn
from outcrop.models.catalog import BaseModel
from outcrop.store import models, throughputs
from outcrop.store.rows import CustomModel, ProvisionedModel


@dataclass(frozen=True)
class Target:
    """What an id stands for: a base model, with or without an adapter."""

    model_id: str
    base: BaseModel
    weights: str
    """Key of the base weights; a custom model keeps those it was trained on."""
    artifact: Path | None
    """Folder of the custom model's artifact."""
    digest: str | None = None
    """Of that folder, as it was published."""
    model_arn: str = ""
    """Of the base model or the custom model."""
    throughput: ProvisionedModel | None = None
    """By which it was asked; None is on demand."""


def resolve(context: RequestContext, identifier: str, operation: str) -> Target:
    """Find what an id stands for, after asking whether the caller may use it.

    Raises:
        AccessDeniedException: the caller may not do `bedrock:<operation>` on what it names.
        ResourceNotFoundException, ValidationException: there is no such model, or it cannot be
            asked by this id.
        ModelNotReadyException: its throughput is still being created.
    """
    account, region = context.account, context.region
    parsed = parse_arn(identifier)
    kind = parsed.resource_type if parsed else None
    model_id = identifier.rpartition("/")[2]
    resource = identifier if parsed else foundation_model_arn(region, model_id)
    throughput = custom = None
    with context.services.engine.connect() as connection:
        base = context.services.catalog.resolve(identifier, region=context.region)
        if base is None:
            # What it names is looked up first, because that is what the caller must be allowed.
            throughput = throughputs.get_throughput(connection, account, region, identifier)
            if throughput is None:
                custom = models.get_model(connection, account, region, identifier)
            found = throughput or custom
            resource = found.arn if found else resource
        context.require(connection, f"bedrock:{operation}", resource)
        if base is not None:
            arn = foundation_model_arn(region, base.model_id)
            return Target(model_id, base, base.weights, None, model_arn=arn)
        if throughput is not None:
            return _provisioned(connection, context, throughput)
    if custom is not None and context.services.settings.invoke_custom_models:
        return _custom(context, custom)
    if custom is not None:
        raise ValidationException(
            f"Invocation of the custom model {custom.name} with on-demand throughput isn't "
            "supported here (invoke_custom_models is false). Create a provisioned model throughput "
            "for it and invoke that one's ARN."
        )
    if kind in (None, "foundation-model"):
        raise ValidationException(
            f"The provided model identifier is invalid: {identifier}. ListFoundationModels and "
            "ListProvisionedModelThroughputs list what can be invoked."
        )
    raise ResourceNotFoundException(f"Model not found: {identifier}.")


def _custom(context: RequestContext, custom: CustomModel) -> Target:
    """Return what a custom model's own id stands for: the same as with a throughput."""
    base = context.services.catalog.resolve(custom.base_model_id)
    if base is None:
        raise ModelErrorException(
            f"The base model of {custom.name} is not in the catalogue any more."
        )
    artifact = context.services.settings.data_dir / custom.artifact_path
    return Target(
        *(custom.arn, base, custom.spec["weights"], artifact, custom.artifact_digest),
        model_arn=custom.arn,
    )


def _provisioned(
    connection: Connection, context: RequestContext, throughput: ProvisionedModel
) -> Target:
    if throughput.status == "Creating":
        raise ModelNotReadyException(
            f"The provisioned throughput {throughput.name} is still Creating. Try again when it "
            "is InService."
        )
    if throughput.status == "Failed":
        raise ValidationException(
            f"The provisioned throughput {throughput.name} has failed: {throughput.failure_message}"
        )
    catalog = context.services.catalog
    custom = models.get_model(connection, context.account, context.region, throughput.model_arn)
    base = catalog.resolve(custom.base_model_id if custom else throughput.model_arn)
    if base is None:
        raise ModelErrorException(
            f"The base model of {throughput.name} is not in the catalogue any more."
        )
    artifact = context.services.settings.data_dir / custom.artifact_path if custom else None
    digest = custom.artifact_digest if custom else None
    return Target(
        *(throughput.arn, base, throughput.weights, artifact, digest),
        model_arn=throughput.model_arn,
        throughput=throughput,
    )
