"""An operation of our own: what became of invocation logs and events, for their owner."""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.log_spool import spool_folder
from outcrop.store.delivery import list_counts
from outcrop.store.spool import folder_bytes


def get_delivery_status(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Tell what was delivered, what is tried again and what was dropped, with the last reasons."""
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:GetDeliveryStatus", "*")
        counts = list_counts(connection, context.account, context.region)
    return {
        "deliveries": [
            {
                "channel": count.channel,
                "outcome": count.outcome,
                "number": count.number,
                "lastTime": count.last_at,
                "detail": count.detail,
            }
            for count in counts
        ],
        "spoolBytes": folder_bytes(spool_folder(context.services.settings)),
    }
