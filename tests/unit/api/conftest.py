"""The gateway's services on an empty database, with the models that ship, and nobody to call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from outcrop.api.context import RequestContext, Services
from outcrop.identity import accounts
from outcrop.identity.bootstrap import bootstrap
from outcrop.identity.credentials import Credentials
from outcrop.identity.principals import user_principal
from outcrop.models.catalog import load_catalog
from outcrop.objects.client import Backend
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate, transaction

Context = Callable[..., RequestContext]


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """Settings under which nothing waits for a model server."""
    return Settings(data_dir=data_dir, model_start_seconds=0)


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    engine = connect(settings.effective_database_url)
    migrate(engine)
    yield Services(
        settings=settings,
        engine=engine,
        catalog=load_catalog(settings),
        backend=Backend("http://127.0.0.1:1", "key", "secret", "us-east-1"),
        http=httpx.AsyncClient(),
        page_key=b"k" * 32,
    )
    engine.dispose()


@pytest.fixture
def owner(services: Services) -> Credentials:
    """The owner that the first start makes."""
    return bootstrap(services.engine, services.settings)


@pytest.fixture
def context(services: Services, owner: Credentials) -> Context:
    """Makes the context of an operation: the owner's, or of a user who may do what is allowed."""

    def make(operation: str, *, allowed: tuple[str, str] | None = None) -> RequestContext:
        name = owner.user
        if allowed is not None:
            name = "somebody"
            statement = {"Effect": "Allow", "Action": allowed[0], "Resource": allowed[1]}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            with transaction(services.engine) as connection:
                accounts.create_user(connection, owner.account, name)
                accounts.put_user_policy(connection, owner.account, name, "p", policy)
        return RequestContext(
            services=services,
            request_id="r",
            account=owner.account,
            region=services.settings.region,
            principal=user_principal(owner.account, name),
            service="bedrock",
            operation=operation,
            received_at=datetime.now(UTC),
        )

    return make
