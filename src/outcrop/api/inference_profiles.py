"""Operations on inference profiles: create, get, list, delete.

An application inference profile is another ARN for a base model: whoever asks by it is counted
apart. There are no system-defined ones, because those spread requests over regions.
"""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import PROFILE, find
from outcrop.errors import ResourceNotFoundException
from outcrop.ids import foundation_model_arn, inference_profile_arn, new_id
from outcrop.store import profiles, tags
from outcrop.store.database import transaction
from outcrop.store.rows_endpoints import InferenceProfile, NewInferenceProfile
from outcrop.store.tokens import find_replay, request_token

APPLICATION = "APPLICATION"


def create(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Make a profile of a base model."""
    source = params["modelSource"]["copyFrom"]
    profile_id = new_id()
    arn = inference_profile_arn(context.region, context.account, profile_id)
    with transaction(context.services.engine) as connection:
        # Source: Bedrock User Guide, "Prerequisites for inference profiles": both are asked for.
        for resource in (context.arn(PROFILE.arn_type), source):
            context.require(connection, "bedrock:CreateInferenceProfile", resource)
        token = request_token(context.account, context.region, context.operation, params)
        # A repeat is answered as the first request was, also when its model is gone meanwhile.
        replayed = find_replay(connection, token)
        if replayed is None:
            made = profiles.create_profile(
                connection,
                NewInferenceProfile(
                    id=profile_id,
                    account=context.account,
                    region=context.region,
                    arn=arn,
                    name=params["inferenceProfileName"],
                    model_arn=_source(context, source),
                    description=params.get("description"),
                ),
                token=token,
                max_profiles=context.services.settings.max_inference_profiles,
            )
            tag_list = tags.checked_tags(arn, params.get("tags", ()))
            tags.put_tags(connection, context.account, context.region, arn, tag_list)
        else:
            made = profiles.made_before(connection, replayed)
    return {"inferenceProfileArn": made.arn, "status": "ACTIVE"}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe a profile, named by ARN or id."""
    identifier = params["inferenceProfileIdentifier"]
    with context.services.engine.connect() as connection:
        return _describe(find(connection, context, PROFILE, identifier, "GetInferenceProfile"))


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List profiles, newest first."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListInferenceProfiles", "*")
        if params.get("typeEquals") not in (None, APPLICATION):
            return {"inferenceProfileSummaries": []}
        page = profiles.list_profiles(
            *(connection, context.account, context.region),
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"inferenceProfileSummaries": [_describe(item) for item in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Delete a profile; the base model stays."""
    identifier = params["inferenceProfileIdentifier"]
    with transaction(context.services.engine) as connection:
        found = find(connection, context, PROFILE, identifier, "DeleteInferenceProfile")
        profiles.delete_profile(connection, found)
    return {}


def _source(context: RequestContext, arn: str) -> str:
    """Return the ARN of the base model that a profile is made of, with the id that was given."""
    base = context.services.catalog.resolve(arn, region=context.region)
    if base is None:
        raise ResourceNotFoundException(
            f"{arn} names no base model in {context.region}. ListFoundationModels lists their "
            "ARNs. System-defined inference profiles are not offered by this service."
        )
    return foundation_model_arn(context.region, arn.rpartition("/")[2])


def _describe(item: InferenceProfile) -> dict[str, Any]:
    return {
        "inferenceProfileName": item.name,
        "description": item.description,
        "createdAt": item.created_at,
        "updatedAt": item.created_at,
        "inferenceProfileArn": item.arn,
        "models": [{"modelArn": item.model_arn}],
        "inferenceProfileId": item.id,
        "status": "ACTIVE",
        "type": APPLICATION,
    }
