"""What an operation is given: the services it may use, and who asked for what.

`Services` is built once at start, `RequestContext` once a request. Account and region come from
here and from nowhere else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from sqlalchemy import Connection, Engine

from outcrop.api.log_spool import InvocationLog
from outcrop.api.usage import UsageMeter
from outcrop.identity.authorize import authorize
from outcrop.identity.principals import Principal
from outcrop.meter.prices import PriceBook, published_prices
from outcrop.models.catalog import Catalog
from outcrop.objects.client import Backend, ObjectStore
from outcrop.objects.client import backend as current_backend
from outcrop.serve.client import ModelClient
from outcrop.settings import Settings
from outcrop.store.remembered import Remembered

KEPT_CONNECTIONS = 64
"""To each model server, between requests."""


@dataclass(frozen=True)
class Services:
    """The long-lived parts that requests share."""

    settings: Settings
    engine: Engine
    """The database."""
    catalog: Catalog
    """The base models on offer."""
    backend: Backend
    """Where S3 requests are passed on to."""
    http: httpx.AsyncClient
    """Connections to the object store."""
    page_key: bytes
    """Signs the tokens of paged lists."""
    usage: UsageMeter = field(default_factory=UsageMeter)
    """Counts the tokens of answers."""
    invocation_log: InvocationLog | None = None
    """Takes what is logged of invocations; None logs none."""
    prices: PriceBook = field(default_factory=published_prices)
    """What use costs."""
    touched: dict[str, float] = field(default_factory=dict)
    """By the key of base weights: when the use of their model server was last written, on the
    monotonic clock."""
    remembered: Remembered = field(default_factory=Remembered)
    """What was read of the database for each request and has not changed."""
    model_clients: dict[str, ModelClient] = field(default_factory=dict)
    """By the key of base weights."""

    @property
    def objects(self) -> ObjectStore:
        """The object store for our own reads, where it is now: it may have been started again.

        Raises:
            ObjectStoreError: the embedded store is not running.
        """
        return _client(current_backend(self.settings))

    def model_client(self, weights: str, address: Path) -> ModelClient:
        """Return the client of a model server, which keeps its connections; for the event loop.

        Args:
            address: where the server of these weights listens now.
        """
        client = self.model_clients.get(weights)
        if client is None or client.socket != address:
            if client is not None:
                client.close()
            client = self.model_clients[weights] = ModelClient(address, keeps=KEPT_CONNECTIONS)
        return client

    def close_model_clients(self) -> None:
        """End the kept connections to model servers."""
        for client in self.model_clients.values():
            client.close()


@dataclass
class Tally:
    """The tokens that a request took so far."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class RequestContext:
    """One authenticated request."""

    services: Services
    request_id: str
    account: str
    region: str
    principal: Principal
    service: str
    """`bedrock`, `bedrock-runtime`, `sts` or `outcrop`."""
    operation: str
    """The operation's name in the service model."""
    received_at: datetime
    """UTC instant at which the request's head had arrived."""
    resolved: dict[tuple[str, str], Any] = field(default_factory=dict)
    """By id and action: what ids stand for, as far as it was found beforehand (`asked.py`)."""
    tally: Tally = field(default_factory=Tally)

    def require(self, connection: Connection, action: str, resource: str) -> None:
        """Refuse with AccessDeniedException unless the caller may do `action` on `resource`."""
        authorize(connection, self.principal, action, resource)

    def arn(self, resource_type: str, resource_id: str = "*") -> str:
        """Return the ARN of a resource of the caller's account, for a policy decision."""
        return f"arn:aws:bedrock:{self.region}:{self.account}:{resource_type}/{resource_id}"


StreamEvent: TypeAlias = tuple[str, Mapping[str, Any]]
"""An event of an output stream: its name in the service model, and its members."""


@dataclass(frozen=True)
class EventStream:
    """An answer that is sent while it is made, from its first event on.

    The first is there already: what refuses a request before it is an error of the request. Who
    takes one closes `rest`.
    """

    first: StreamEvent
    rest: AsyncGenerator[StreamEvent, None]


@dataclass(frozen=True)
class Output:
    """What an operation answers where its members are not all."""

    members: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    """Those that no model names."""
    stream: EventStream | None = None
    """Where the model has an event stream."""


async def begun(events: AsyncGenerator[StreamEvent, None]) -> EventStream:
    """Return a stream whose first event has come. Raises as the events do."""
    return EventStream(await anext(events), events)


@lru_cache(maxsize=1)
def _client(place: Backend) -> ObjectStore:
    return ObjectStore(place)  # made once for each place: that takes a tenth of a second
