"""Counts the tokens of answers, and writes them to the database beside the requests.

Answers are counted at their end, streams and those that broke off too. The counts are in memory
until they are written, every few seconds and at the gateway's end: a gateway that is killed loses
those of its last `FLUSH_SECONDS`. A database that is away keeps no answer waiting: what could not
be written is written the next time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import anyio.to_thread
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.store.database import transaction
from outcrop.store.rows import TokenUsage, UsageKey
from outcrop.store.usage import add_usage

logger = logging.getLogger("outcrop.gateway")

FLUSH_SECONDS = 5.0


class UsageMeter:
    """What was answered and is not written yet. Any thread may count."""

    def __init__(self) -> None:
        self._counted: dict[UsageKey, TokenUsage] = {}
        self._lock = threading.Lock()

    def count(
        self,
        account: str,
        region: str,
        model_arn: str,
        throughput_arn: str,
        added: TokenUsage,
        *,
        endpoint_arn: str = "",
    ) -> None:
        """Count an answer that ended now.

        Args:
            throughput_arn: of the provisioned throughput that was asked, else empty.
            endpoint_arn: of the deployment or inference profile that was asked, else empty.
        """
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        key = UsageKey(account, region, model_arn, throughput_arn, hour, endpoint_arn)
        with self._lock:
            self._add(key, added)

    def flush(self, engine: Engine) -> None:
        """Write what was counted, all or nothing; what could not be written stays counted."""
        with self._lock:
            counted, self._counted = self._counted, {}
        if not counted:
            return
        try:
            with transaction(engine) as connection:
                add_usage(connection, counted)
        except SQLAlchemyError:  # a full disk, or a database that is away
            logger.exception("usage could not be written; it is tried again")
            with self._lock:
                for key, added in counted.items():
                    self._add(key, added)

    @asynccontextmanager
    async def flushing(self, engine: Engine) -> AsyncIterator[None]:
        """Write every few seconds, and once more at the end."""
        writer = asyncio.create_task(self._keep_flushing(engine))
        try:
            yield
        finally:
            writer.cancel()
            with suppress(asyncio.CancelledError):
                await writer
            self.flush(engine)

    async def _keep_flushing(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await anyio.to_thread.run_sync(self.flush, engine)

    def _add(self, key: UsageKey, added: TokenUsage) -> None:
        found = self._counted.get(key, TokenUsage(0, 0, 0))
        self._counted[key] = TokenUsage(
            found.requests + added.requests,
            found.input_tokens + added.input_tokens,
            found.output_tokens + added.output_tokens,
        )
