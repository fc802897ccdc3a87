"""Who waits for a model server: throughputs and deployments that are created, or move to another
model. The supervisor asks for their servers and says what became of them.
"""

from __future__ import annotations

from sqlalchemy import Connection

from outcrop.store import deployments, throughputs


def awaited_weights(connection: Connection) -> set[str]:
    """Return the keys of base weights whose model server is waited for."""
    return throughputs.awaited_weights(connection) | deployments.awaited_weights(connection)


def weights_are_served(connection: Connection, weights: str) -> int:
    """Say that a model server is up; returns for how many that was the end of waiting."""
    return throughputs.mark_in_service(connection, weights) + deployments.mark_active(
        connection, weights
    )


def weights_failed(connection: Connection, weights: str, message: str) -> int:
    """Say that a model server cannot be started; returns how many waited for it.

    What was to be created has failed; what was to move to another model keeps the one it has.
    """
    return throughputs.mark_failed(connection, weights, message) + deployments.mark_failed(
        connection, weights, message
    )
