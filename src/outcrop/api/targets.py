"""What a modelId stands for: the forms of an id, and the weights and artifact behind each.

Looks an id up, asks whether the caller may use what it names, and returns a Target. Knows nothing
of model servers: it reads rows and the catalogue only.

Source: botocore's bedrock-runtime model, InvokeModelIdentifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.resources import (
    CUSTOM_MODEL,
    DEPLOYMENT,
    IMPORTED_MODEL,
    PROFILE,
    THROUGHPUT,
    Kind,
    Resource,
)
from outcrop.errors import (
    ModelErrorException,
    ModelNotReadyException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.ids import foundation_model_arn, parse_arn
from outcrop.models.catalog import BaseModel
from outcrop.store import models
from outcrop.store.imported_models import get_imported_model
from outcrop.store.rows import CustomModel, ImportedModel, ProvisionedModel
from outcrop.store.rows_endpoints import Deployment, InferenceProfile

T = TypeVar("T", bound=Resource)


@dataclass(frozen=True)
class Target:
    """What an id stands for: a base model, with or without an adapter."""

    model_id: str
    base: BaseModel
    weights: str
    """Key of the base weights; a custom model keeps those it was trained on."""
    artifact: Path | None
    """Folder of the custom model's artifact; None of a base model, of an imported model and of a
    custom model that is its own base."""
    digest: str | None = None
    """Of that folder, as it was published."""
    model_arn: str = ""
    """Of the base model, the imported model or the custom model."""
    throughput: ProvisionedModel | None = None
    """By which it was asked; None is on demand."""
    endpoint_arn: str = ""
    """Of the deployment or the inference profile by which it was asked; empty where neither was."""


@dataclass(frozen=True)
class _Form(Generic[T]):
    """A kind of resource by which a model can be asked."""

    kind: Kind[T]
    target: Callable[[Connection, RequestContext, T, str], Target]
    """Takes a resource that the caller may use, and the operation."""


def resolve(context: RequestContext, identifier: str, operation: str) -> Target:
    """Find what an id stands for, after asking whether the caller may use it.

    Raises:
        AccessDeniedException: the caller may not do `bedrock:<operation>` on what it names.
        ResourceNotFoundException, ValidationException: there is no such model, or it cannot be
            asked by this id.
        ModelNotReadyException: its throughput is still being created.
    """
    region = context.region
    parsed = parse_arn(identifier)
    resource = identifier if parsed else foundation_model_arn(region, identifier)
    with context.services.engine.connect() as connection:
        base = context.services.catalog.resolve(identifier, region=region)
        if base is not None:
            model_id = identifier.rpartition("/")[2]  # which may be another than the model's first
            arn = foundation_model_arn(region, model_id)
            context.require(connection, f"bedrock:{operation}", arn)
            return replace(_of_base(context, base), model_id=model_id)
        for form in FORMS:
            # An ARN says itself of which kind it is.
            if parsed is not None and parsed.resource_type != form.kind.arn_type:
                continue
            # What it names is looked up first, because that is what the caller must be allowed.
            found = form.kind.get(connection, context.account, region, identifier)
            if found is not None:
                context.require(connection, f"bedrock:{operation}", found.arn)
                return form.target(connection, context, found, operation)
        context.require(connection, f"bedrock:{operation}", resource)
    if parsed is None or parsed.resource_type == "foundation-model":
        raise ValidationException(
            f"The provided model identifier is invalid: {identifier}. ListFoundationModels and "
            "ListProvisionedModelThroughputs list what can be invoked."
        )
    raise ResourceNotFoundException(f"Model not found: {identifier}.")


def weights_of(context: RequestContext, custom: CustomModel) -> str:
    """Return the key of the base weights that a custom model is served on.

    Raises:
        ValidationException: its base model is not in the catalogue any more.
    """
    if context.services.catalog.resolve(custom.base_model_id) is None:
        raise ValidationException(
            f"The base model {custom.base_model_id} of {custom.name} is not in the catalogue "
            "any more. Add it again with `outcrop models add`."
        )
    return str(custom.spec["weights"])


def _of_base(context: RequestContext, base: BaseModel) -> Target:
    arn = foundation_model_arn(context.region, base.model_id)
    return Target(base.model_id, base, base.weights, None, model_arn=arn)


def _of_custom(context: RequestContext, custom: CustomModel) -> Target:
    base = context.services.catalog.resolve(custom.base_model_id)
    if base is None:
        raise ModelErrorException(
            f"The base model of {custom.name} is not in the catalogue any more."
        )
    if not custom.is_own_base:  # what was trained was rendered, by whatever template there is
        base = replace(base, takes_messages=True)
    return Target(
        *(custom.arn, base, str(custom.spec["weights"]), *_artifact(context, custom)),
        model_arn=custom.arn,
    )


def _artifact(context: RequestContext, custom: CustomModel) -> tuple[Path | None, str | None]:
    """Return the folder that stands beside the base weights, and its digest."""
    if custom.is_own_base:
        return None, None
    return context.services.settings.data_dir / custom.artifact_path, custom.artifact_digest


def _of_imported(context: RequestContext, model: ImportedModel) -> Target:
    base = context.services.catalog.resolve(model.weights)
    if base is None:
        raise ModelErrorException(f"The weights of {model.name} are gone. Import the model again.")
    return Target(model.arn, base, model.weights, None, model_arn=model.arn)


def _custom(
    connection: Connection, context: RequestContext, custom: CustomModel, operation: str
) -> Target:
    if custom.status == "Creating":
        raise ModelNotReadyException(
            f"The custom model {custom.name} is still Creating. Try again when it is Active."
        )
    if custom.status == "Failed":
        raise ValidationException(
            f"The custom model {custom.name} has failed: {custom.failure_message}"
        )
    if context.services.settings.invoke_custom_models:
        return _of_custom(context, custom)
    raise ValidationException(
        f"Invocation of the custom model {custom.name} with on-demand throughput isn't "
        "supported here (invoke_custom_models is false). Create a custom model deployment or a "
        "provisioned model throughput for it and invoke that one's ARN."
    )


def _imported(
    connection: Connection, context: RequestContext, model: ImportedModel, operation: str
) -> Target:
    """An imported model answers by itself: it needs neither deployment nor throughput."""
    return _of_imported(context, model)


def _provisioned(
    connection: Connection, context: RequestContext, throughput: ProvisionedModel, operation: str
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
    scope = (connection, context.account, context.region, throughput.model_arn)
    custom, imported = models.get_model(*scope), get_imported_model(*scope)
    if custom is not None:
        target = _of_custom(context, custom)
    elif imported is not None:
        target = _of_imported(context, imported)
    else:
        base = context.services.catalog.resolve(throughput.model_arn)
        if base is None:
            raise ModelErrorException(
                f"The base model of {throughput.name} is not in the catalogue any more."
            )
        target = _of_base(context, base)
    return replace(
        target,
        model_id=throughput.arn,
        weights=throughput.weights,
        model_arn=throughput.model_arn,
        throughput=throughput,
    )


def _deployed(
    connection: Connection, context: RequestContext, deployment: Deployment, operation: str
) -> Target:
    """One that is still being created answers too: the request waits for the model server."""
    if deployment.status == "Failed":
        raise ValidationException(
            f"The custom model deployment {deployment.name} has failed: "
            f"{deployment.failure_message} Delete it and create another."
        )
    account, region = context.account, context.region
    custom = models.get_model(connection, account, region, deployment.model_arn)
    if custom is None:  # both were deleted since the look at the deployment
        raise ResourceNotFoundException(f"Model not found: {deployment.arn}.")
    return replace(
        _of_custom(context, custom), model_id=deployment.arn, endpoint_arn=deployment.arn
    )


def _profiled(
    connection: Connection, context: RequestContext, profile: InferenceProfile, operation: str
) -> Target:
    """Source: Bedrock User Guide, "Prerequisites for inference profiles": the caller must be
    allowed the model, too.
    """
    base = context.services.catalog.resolve(profile.model_arn, region=context.region)
    if base is None:
        raise ModelErrorException(
            f"The base model of {profile.name} is not in the catalogue any more: "
            f"{profile.model_arn}."
        )
    context.require(connection, f"bedrock:{operation}", profile.model_arn)
    return replace(_of_base(context, base), model_id=profile.arn, endpoint_arn=profile.arn)


FORMS: tuple[_Form[Any], ...] = (
    _Form(THROUGHPUT, _provisioned),
    _Form(CUSTOM_MODEL, _custom),
    _Form(IMPORTED_MODEL, _imported),
    _Form(DEPLOYMENT, _deployed),
    _Form(PROFILE, _profiled),
)
"""The kinds of resources by which a model can be asked, besides base models. A name that several
kinds have stands for the first of them here.
"""
