"""Where the model server of some base weights listens; one that is not there is asked for.

The servers are rows (store/servers.py): who asks models looks, waits and looks again, and never
starts a process. Gateway and batch jobs look here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from sqlalchemy import Engine

from outcrop.errors import ModelErrorException
from outcrop.settings import Settings
from outcrop.store import servers
from outcrop.store.database import transaction
from outcrop.store.rows import ModelServer

FIRST_LOOK_SECONDS = 0.02
LONGEST_LOOK_SECONDS = 0.1
"""Between two looks for a server that is being started: more each time, up to so many."""
TOUCH_SECONDS = 5.0
"""How exact a model server's last use is recorded: one write each so many seconds is enough."""
RETRY_SECONDS = 10.0
"""After a model server could not be started, requests are refused for so long before it is
tried again.
"""


def find_server(
    settings: Settings, engine: Engine, weights: str, touched: dict[str, float]
) -> ModelServer | None:
    """Return the row of a server that is ready, with its address; None where it is not yet.

    Args:
        weights: key of the base weights.
        touched: by that key, when the server's use was last written, on the monotonic clock; is
            kept up to date here.
    Raises:
        ModelErrorException: it could not be started, some seconds ago.
    """
    with engine.connect() as connection:
        row = servers.get(connection, weights)
    if row is not None and row.state == "failed":
        if servers.idle_seconds(row) < RETRY_SECONDS:
            raise ModelErrorException(
                f"The model server could not be started: {row.error}. Its log in the data "
                "directory has the reason."
            )
        row = None
    if row is None:
        with transaction(engine) as connection:
            servers.want(connection, weights)
        return None
    if row.state != "ready" or row.address is None:
        return None
    if is_touch_due(settings, weights, touched):
        touched[weights] = time.monotonic()
        with transaction(engine) as connection:
            servers.touch(connection, weights)
    return row


def is_touch_due(settings: Settings, weights: str, touched: Mapping[str, float]) -> bool:
    """Return whether the use of a server is to be written again."""
    # A server that was used must never look idle for as long as ends it.
    every = min(TOUCH_SECONDS, settings.model_idle_seconds / 4)
    return time.monotonic() - touched.get(weights, -math.inf) >= every
