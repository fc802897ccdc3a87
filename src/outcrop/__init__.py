"""Outcrop: Amazon Bedrock's model customization on your own machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from botocore.client import BaseClient

__version__ = "0.1.0"


def client(**options: Any) -> BaseClient:
    """Return a boto3 client of the operations that Bedrock lacks, such as GetJobProgress.

    Args:
        options: what `boto3.client` takes; endpoint and credentials come from the environment as
            for any client.
    """
    from outcrop.wire.client import outcrop_client

    return outcrop_client(**options)
