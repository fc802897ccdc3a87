"""The service models that drive everything else on the wire.

Loads botocore's own models of `bedrock`, `bedrock-runtime` and `sts`, and ours of `outcrop`, which
holds the operations Bedrock lacks in the same format. Knows no operation by name. Only botocore's
own folder and ours are searched: a model in the user's home must not change what the server does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel, Shape

SERVICES = ("bedrock", "bedrock-runtime", "sts", "outcrop")
"""The services whose requests are understood here; S3 is passed on, not understood."""

REST_SERVICES = ("bedrock", "bedrock-runtime", "outcrop")
"""Those of the rest-json protocol; their paths do not collide, so one table routes them all."""

MODELS_PATH = Path(__file__).parent / "models"
"""The folder of our own models, in botocore's layout."""


@cache
def service_model(service: str) -> ServiceModel:
    """Return the model of one of `SERVICES`, loaded once.

    Raises:
        botocore.exceptions.UnknownServiceError: there is no model of that name.
    """
    loader = Loader(
        extra_search_paths=[Loader.BUILTIN_DATA_PATH, str(MODELS_PATH)],
        include_default_search_paths=False,
    )
    return ServiceModel(loader.load_service_model(service, "service-2"), service_name=service)


def error_shape(service: str, code: str) -> Shape | None:
    """Return the modelled shape of an error code, or None where the service models none."""
    if service not in SERVICES:
        return None
    return service_model(service).shape_for_error_code(code)


def wire_name(shape: Shape, member: str) -> str:
    """Return the name that `member` has on the wire (its locationName, where it has one)."""
    name: str = shape.serialization.get("name", member)
    return name


def is_document(shape: Shape) -> bool:
    """Say whether a structure holds free JSON."""
    return shape.type_name == "structure" and bool(shape.is_document_type)


def stream_member(operation: OperationModel, *, output: bool) -> str | None:
    """Return the name of the member that is an event stream, or None."""
    shape = operation.output_shape if output else operation.input_shape
    for name, member in shape.members.items() if shape is not None else ():
        if member.serialization.get("eventstream"):
            return str(name)
    return None
