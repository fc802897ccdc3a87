"""Operations on invocation logging: turn it on, look at it, turn it off.

Source of the check's name: buckets of the live service; each Put leaves such an object.
"""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.log_shipping import log_root
from outcrop.errors import AccessDeniedException, ApiError, ObjectStoreError, ValidationException
from outcrop.ids import S3Uri
from outcrop.jobs.places import check_bucket
from outcrop.objects.client import IS_AWAY
from outcrop.objects.keys import check_key
from outcrop.store import invocation_logging
from outcrop.store.database import transaction

PERMISSION_CHECK = "amazon-bedrock-logs-permission-check"
_KINDS = ("text", "image", "embedding", "video", "audio")
_LONGEST_NAME = "us-east-1/2026/01/01/00/data/00000000-0000-0000-0000-000000000000_output.json.gz"
"""What stands below the root of logs, for a check of the key."""


def put(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Log the account's invocations from now on, once its bucket has taken an object."""
    config = params["loggingConfig"]
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:PutModelInvocationLoggingConfiguration", "*")
        place = _place(config)
        root = log_root(place, context.account)
        # Bedrock asks the bucket's policy, which there is none of here: so the caller answers for
        # it, else logging would write where its caller may not.
        context.require(connection, "s3:PutObject", f"arn:aws:s3:::{root.bucket}/{root.key}/*")
    if context.account != context.services.settings.account:
        # Buckets are not yet kept apart by account; see s3.py.
        raise AccessDeniedException(f"The bucket {place.bucket} belongs to another account.")
    _check_place(context, place)
    kept = {
        "s3Config": {"bucketName": place.bucket, "keyPrefix": config["s3Config"]["keyPrefix"]}
        if "keyPrefix" in config["s3Config"]
        else {"bucketName": place.bucket},
        **{name: config.get(name, True) for name in map("{}DataDeliveryEnabled".format, _KINDS)},
    }
    with transaction(context.services.engine) as connection:
        invocation_logging.put_config(connection, context.account, context.region, kept)
    _forget(context)
    return {}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration; no member at all where nothing is logged, as the live service."""
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:GetModelInvocationLoggingConfiguration", "*")
        config = invocation_logging.get_config(connection, context.account, context.region)
    return {} if config is None else {"loggingConfig": config}


def delete(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Log nothing from now on. What was logged before is still delivered."""
    with transaction(context.services.engine) as connection:
        context.require(connection, "bedrock:DeleteModelInvocationLoggingConfiguration", "*")
        invocation_logging.delete_config(connection, context.account, context.region)
    _forget(context)
    return {}


def _forget(context: RequestContext) -> None:
    if context.services.invocation_log is not None:
        context.services.invocation_log.forget_configuration(context.account, context.region)


def _place(config: dict[str, Any]) -> S3Uri:
    if "cloudWatchConfig" in config:
        raise ValidationException(
            "loggingConfig.cloudWatchConfig is not supported: there is no CloudWatch Logs here. "
            "Give loggingConfig.s3Config alone."
        )
    if "s3Config" not in config:
        raise ValidationException(
            "loggingConfig.s3Config must name the bucket that receives the logs."
        )
    place = S3Uri(config["s3Config"]["bucketName"], config["s3Config"].get("keyPrefix", ""))
    try:
        check_key(log_root(place, "0" * 12).join(_LONGEST_NAME).key)
    except ApiError as error:
        raise ValidationException(
            f"loggingConfig.s3Config.keyPrefix is {place.key!r}. {error.message}"
        ) from error
    return place


def _check_place(context: RequestContext, place: S3Uri) -> None:
    """Prove by a write that logs can be written."""
    objects = context.services.objects
    check_bucket(objects, place)
    probe = log_root(place, context.account).join(PERMISSION_CHECK)
    try:
        objects.write(probe, b"")
    except ObjectStoreError as error:
        if error.code == IS_AWAY:
            raise
        raise ValidationException(
            f"Could not validate PutObject permissions to access S3 bucket: {probe.bucket} at key "
            f"{probe.key}. {error}"
        ) from error
