"""What a request for customization asks for, checked as far as it can be known without the data.

A job and a data task that foretells one ask with the same members, and are refused alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.resources import CUSTOM_MODEL
from outcrop.errors import ModelError, ValidationException
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, foundation_model_arn
from outcrop.jobs.log_inputs import (
    check_config,
    check_source_present,
    check_source_readable,
    logs_config,
)
from outcrop.jobs.parents import describe_parent, plan_parent
from outcrop.jobs.places import (
    TRAINING,
    VALIDATION,
    check_bucket,
    check_present,
    check_readable,
    check_writable,
    file_place,
    output_place,
)
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING, BaseModel
from outcrop.models.weights import weights_folder
from outcrop.objects.client import ObjectStore
from outcrop.store import models
from outcrop.store.database import lock_account
from outcrop.store.imported_models import get_imported_model
from outcrop.store.rows import CustomModel
from outcrop.store.tokens import RequestToken, find_replay
from outcrop.train.plan import TrainPlan, make_plan

OFFERED_TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING)


@dataclass(frozen=True)
class _Start:
    """What a job starts from."""

    base: BaseModel
    parent: CustomModel | None
    """The custom model whose artifact it goes on from; None where it starts from the base weights,
    also where those are an imported model's or a custom model's own."""
    arn: str
    """Of the model that was named."""
    root_arn: str
    """Of the base model at the root."""
    is_owned: bool = True
    """Whether it belongs to an account, which may delete it."""

    @property
    def uses_model_arn(self) -> str | None:
        """The model's ARN where somebody could delete it."""
        return self.arn if self.is_owned else None


@dataclass(frozen=True)
class Prepared:
    """A request that may become a job, as far as the data are not looked at."""

    base: BaseModel
    parent: CustomModel | None
    """The custom model to start from; None starts from the base model."""
    uses_model_arn: str | None
    """Of the custom or imported model that must stay until the job has ended; None is a base
    model of the catalogue."""
    name: str
    """What the model to start from was called by."""
    plan: TrainPlan
    training: S3Uri
    validation: tuple[S3Uri, ...]
    output: S3Uri
    spec: dict[str, Any]
    """What the job's row records of it, beside the members as they were sent."""
    from_logs: bool = False
    """Whether `training` are invocation logs: one, or a prefix of them."""


def prepare(connection: Connection, context: RequestContext, params: dict[str, Any]) -> Prepared:
    """Resolve the model, make the plan, and ask whether the role may read and write.

    Raises:
        AccessDeniedException: the caller may not start from that custom model.
        ValidationException: a member is wrong, or the role may not.
    """
    start = _starting_point(connection, context, params["baseModelIdentifier"])
    base, parent = start.base, start.parent
    _refuse_what_is_not_offered(base, params)
    lineage = {} if parent is None else {"parent": describe_parent(parent)}
    customization_type = params.get("customizationType", FINE_TUNING)
    plan = make_plan(
        base,
        customization_type,
        params.get("hyperParameters", {}),
        has_validation=bool(_validators(params)),
        parent=plan_parent(lineage),
    )
    role = assume_role_for_service(connection, context.account, params["roleArn"])
    training, validation, output = _places(params)
    if logs_config(params) is not None:
        check_source_readable(connection, role, training)
    for uri in validation if logs_config(params) else (training, *validation):
        check_readable(connection, role, uri)
    check_writable(connection, role, output)
    spec = {
        "customizationType": customization_type,
        "baseModelId": base.model_id,
        # An id can be given to other weights later; what is trained stays bound to these.
        "weights": base.weights,
        "baseModelArn": start.arn,
        "foundationModelArn": start.root_arn,
        "hyperParameters": plan.hyper_parameters,
        "userHyperParameters": params.get("hyperParameters", {}),
        **lineage,
    }
    return Prepared(
        *(base, parent, start.uses_model_arn, params["baseModelIdentifier"], plan),
        *(training, tuple(validation), output, spec, logs_config(params) is not None),
    )


def check_objects(objects: ObjectStore, prepared: Prepared) -> int:
    """Return the bytes of the files; refuse unless they and the bucket for the output are there.

    Raises:
        ValidationException: so it is.
        ObjectStoreError: the store is away.
    """
    check_bucket(objects, prepared.output)
    found = [check_present(objects, uri, VALIDATION) for uri in prepared.validation]
    if prepared.from_logs:  # what is made of them is not known before they are read
        check_source_present(objects, prepared.training)
    else:
        found.append(check_present(objects, prepared.training, TRAINING))
    return sum(each.num_bytes for each in found)


def hold_parent(
    connection: Connection,
    context: RequestContext,
    prepared: Prepared,
    token: RequestToken | None,
) -> None:
    """Keep the model that a job starts from until this transaction ends, which writes that job.

    It was looked at in a transaction before, and somebody may have deleted it since. A request that
    only repeats an earlier one needs it no more.

    Raises:
        ValidationException: it is not there any more.
    """
    if prepared.uses_model_arn is None:
        return
    lock_account(connection, context.account, context.region)
    scope = (connection, context.account, context.region, prepared.uses_model_arn)
    is_there = models.get_model(*scope) or get_imported_model(*scope)
    if is_there is None and find_replay(connection, token) is None:
        raise ValidationException(
            f"The model {prepared.name} was deleted while the job was created. Start from another "
            "model."
        )


def _starting_point(connection: Connection, context: RequestContext, identifier: str) -> _Start:
    """Return the base model that is named, or the custom model and the base model at its root.

    A custom model is named by its ARN, by its name, or by an ARN that ends in its name. Its root
    has the weights that it was made from, also if the id stands for others by now. An imported
    model, named by ARN or name, is a base model.

    Raises:
        AccessDeniedException: the caller may not start from that custom model.
        ValidationException: there is no such model.
    """
    catalog = context.services.catalog
    base = catalog.resolve(identifier, region=context.region)
    if base is not None:
        arn = foundation_model_arn(context.region, base.customization_id)
        return _Start(base, None, arn, arn, is_owned=False)
    custom = models.find_model(connection, context.account, context.region, identifier)
    named = identifier if identifier.startswith("arn:") else context.arn(CUSTOM_MODEL.arn_type)
    imported = None
    if custom is None:
        imported = get_imported_model(connection, context.account, context.region, identifier)
    known = custom or imported
    context.require(connection, f"bedrock:{context.operation}", known.arn if known else named)
    if imported is not None:
        base = catalog.resolve(imported.weights)
        if base is None:
            raise ValidationException(
                f"The weights of the imported model {imported.name} are gone. Import it again."
            )
        return _Start(base, None, imported.arn, imported.arn)
    if custom is None:
        raise ValidationException(
            f"The provided model identifier is invalid: {identifier}. ListFoundationModels, "
            "ListCustomModels and ListImportedModels list what can be customized."
        )
    if custom.status != "Active":
        raise ValidationException(
            f"The custom model {custom.name} is {custom.status}. Only a model that is Active can "
            "be customized."
        )
    base = catalog.resolve(custom.base_model_id)
    if base is None:
        raise ValidationException(
            f"The base model {custom.base_model_id} of {custom.name} is not in the catalogue any "
            "more. Add it again with `outcrop models add`."
        )
    try:
        weights_folder(context.services.settings, custom.spec["weights"])
    except ModelError as error:
        raise ValidationException(
            f"The base weights of the custom model {custom.name} are not there any more. {error}"
        ) from error
    root = replace(base, weights=custom.spec["weights"])
    parent = None if custom.is_own_base else custom
    return _Start(root, parent, custom.arn, custom.foundation_model_arn)


def _refuse_what_is_not_offered(base: BaseModel, params: dict[str, Any]) -> None:
    customization_type = params.get("customizationType", FINE_TUNING)
    if customization_type not in OFFERED_TYPES:
        raise ValidationException(
            f"customizationType {customization_type} is not offered yet. Offered: "
            f"{', '.join(OFFERED_TYPES)}."
        )
    if customization_type not in base.customizations:
        offered = ", ".join(base.customizations) or "none"
        raise ValidationException(
            f"{base.model_id} cannot be customized by {customization_type}. Offered for it: "
            f"{offered}."
        )
    if "customizationConfig" in params:
        raise ValidationException(
            f"customizationConfig.{next(iter(params['customizationConfig']))} belongs to "
            "distillation and reinforcement fine-tuning, which are not offered yet. Leave it out. "
            f"Offered: {', '.join(OFFERED_TYPES)}."
        )
    if "customModelKmsKeyId" in params:
        raise ValidationException(
            "customModelKmsKeyId is not supported yet: custom models are not encrypted with a "
            "key of yours. Leave it out to accept that."
        )
    if len(_validators(params)) > 1:
        raise ValidationException(
            f"validationDataConfig.validators has {len(_validators(params))} entries; one is "
            "allowed."
        )


def _validators(params: dict[str, Any]) -> list[dict[str, str]]:
    return list(params.get("validationDataConfig", {}).get("validators", ()))


def _places(params: dict[str, Any]) -> tuple[S3Uri, list[S3Uri], S3Uri]:
    named, logs = params["trainingDataConfig"].get("s3Uri"), logs_config(params)
    if (named is None) is (logs is None):
        raise ValidationException(
            "trainingDataConfig must name the training data once: s3Uri, a JSONL file, or "
            "invocationLogsConfig."
        )
    if logs is not None:
        training = check_config(logs, params.get("customizationType", FINE_TUNING))
    else:
        training = file_place(TRAINING, named)
    return (
        training,
        [file_place(VALIDATION, validator["s3Uri"]) for validator in _validators(params)],
        output_place("outputDataConfig.s3Uri", params["outputDataConfig"]["s3Uri"]),
    )
