"""A boto3 client for the operations that Bedrock lacks.

Gives boto3 our service model; everything else (credentials, region, endpoint, retries) is boto3's
own. The only module of this room that imports boto3.
"""

from __future__ import annotations

from typing import Any

import boto3
import botocore.session

from outcrop.errors import SettingsError
from outcrop.wire.model import MODELS_PATH


def outcrop_client(**kwargs: Any) -> Any:
    """Return a boto3 client whose methods are `get_job_progress`, `list_job_events`, ...

    Args:
        kwargs: as for `boto3.client`: `region_name`, `endpoint_url`, `config`, and so on.
    Raises:
        SettingsError: no endpoint is configured. There is no public endpoint to fall back on.
    """
    session = botocore.session.Session()
    session.get_component("data_loader").search_paths.append(str(MODELS_PATH))
    client = boto3.session.Session(botocore_session=session).client("outcrop", **kwargs)
    if client.meta.endpoint_url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        raise SettingsError(
            "No endpoint is configured for the client. Set AWS_ENDPOINT_URL to the URL of "
            "`outcrop serve` (`outcrop env` prints it), or pass endpoint_url."
        )
    return client
