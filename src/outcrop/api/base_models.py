"""Operations on base models: what the catalogue offers, in Bedrock's shapes."""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.errors import ResourceNotFoundException
from outcrop.ids import foundation_model_arn
from outcrop.models.catalog import BaseModel


def list_foundation_models(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List the base models; a context-suffixed variant is an entry of its own, as in Bedrock."""
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListFoundationModels", "*")
    summaries = [
        _details(context, base, model_id)
        for base in context.services.catalog.models
        for model_id in _listed_ids(base)
    ]
    return {"modelSummaries": [item for item in summaries if _wanted(item, params)]}


def get_foundation_model(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe one base model, named by id or ARN."""
    identifier = params["modelIdentifier"]
    base = context.services.catalog.resolve(identifier, region=context.region)
    model_id = identifier.rpartition("/")[2]
    with context.services.engine.connect() as connection:
        arn = foundation_model_arn(context.region, model_id)
        context.require(connection, "bedrock:GetFoundationModel", arn)
    if base is None:
        raise ResourceNotFoundException(
            "Could not resolve the foundation model from the provided model identifier: "
            f"{identifier}"
        )
    return {"modelDetails": _details(context, base, model_id)}


def get_foundation_model_availability(
    context: RequestContext, params: dict[str, Any]
) -> dict[str, Any]:
    """Say that a base model may be used: weights that are here need no agreement."""
    model_id = params["modelId"]
    with context.services.engine.connect() as connection:
        arn = foundation_model_arn(context.region, model_id)
        context.require(connection, "bedrock:GetFoundationModelAvailability", arn)
    if context.services.catalog.resolve(model_id) is None:
        raise ResourceNotFoundException(f"The foundation model {model_id} is not offered here.")
    return {
        "modelId": model_id,
        "agreementAvailability": {"status": "AVAILABLE"},
        "authorizationStatus": "AUTHORIZED",
        "entitlementAvailability": "AVAILABLE",
        "regionAvailability": "AVAILABLE",
    }


def _listed_ids(base: BaseModel) -> list[str]:
    ids = [base.model_id]
    if base.customization_id != base.model_id:
        ids.append(base.customization_id)
    return ids


def _details(context: RequestContext, base: BaseModel, model_id: str) -> dict[str, Any]:
    """Return the summary of `model_id`.

    A context-suffixed id is listed for provisioned throughput, as Bedrock does. Here it can be
    asked on demand too, which published examples do.
    """
    is_variant = model_id == base.customization_id != base.model_id
    return {
        "modelArn": foundation_model_arn(context.region, model_id),
        "modelId": model_id,
        "modelName": base.model_name,
        "providerName": base.provider_name,
        "inputModalities": ["TEXT"],
        "outputModalities": ["TEXT"],
        "responseStreamingSupported": True,
        "customizationsSupported": list(base.customizations),
        "inferenceTypesSupported": ["PROVISIONED"] if is_variant else ["ON_DEMAND", "PROVISIONED"],
        "modelLifecycle": {"status": "ACTIVE"},
    }


def _wanted(summary: dict[str, Any], params: dict[str, Any]) -> bool:
    provider = params.get("byProvider")
    tests = (
        provider is None or provider.lower() == summary["providerName"].lower(),
        params.get("byCustomizationType") in (None, *summary["customizationsSupported"]),
        params.get("byOutputModality") in (None, *summary["outputModalities"]),
        params.get("byInferenceType") in (None, *summary["inferenceTypesSupported"]),
    )
    return all(tests)
