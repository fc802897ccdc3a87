"""An operation of our own: what became of invocation logs and events, for their owner."""

from __future__ import annotations

import json
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.api.log_spool import spool_folder
from outcrop.jobs.events import describe
from outcrop.store.delivery import list_counts
from outcrop.store.jobs import get_job_by_id
from outcrop.store.outbox import list_dead
from outcrop.store.spool import folder_bytes

MAX_DEAD = 100
"""Events that were given up and are shown: the newest."""


def get_delivery_status(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Tell what was delivered, what is tried again and what was dropped, with the last reasons."""
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:GetDeliveryStatus", "*")
        counts = list_counts(connection, context.account, context.region)
        dead = list_dead(connection, context.account, context.region, limit=MAX_DEAD)
        rows = {each.event.job_id: get_job_by_id(connection, each.event.job_id) for each in dead}
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
        "deadEvents": [
            {
                "target": each.target,
                "detail": each.detail,
                "givenUpTime": each.given_up_at,
                "event": json.dumps(describe(each.event, job), ensure_ascii=False),
            }
            for each in dead
            if (job := rows[each.event.job_id]) is not None
        ],
    }
