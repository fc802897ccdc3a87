"""From a call that has ended to a record on this machine's disk, without holding up the call.

A record is built and appended to the spool (store/spool.py) by a thread of its own, and the call
waits for that a moment only: what was answered is then in the spool also if the gateway is killed
next. Where the disk is slow, full or broken, the call goes on without, and what could not be kept
is counted. A second thread sends the records on (log_shipping.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.api.log_shipping import CHANNEL, Shipper
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store import invocation_logging
from outcrop.store.database import transaction
from outcrop.store.delivery import Counted, CountKey, add_counts
from outcrop.store.spool import SpoolFullError, SpoolWriter

logger = logging.getLogger("outcrop.gateway")

CONFIG_SECONDS = 1.0
"""How old a configuration may be that another gateway changed; changes of this one count at once.
"""
PATIENCE_SECONDS = 0.25
"""How long a call waits for its record to be on the disk; then it goes on, and the record waits."""
SYNC_SECONDS = 1.0
"""How often records are brought to the disk: a power cut takes those of so long at most."""
END_SECONDS = 1.5
"""How long the gateway's end waits for each thread."""
SEGMENT_BYTES = 4 << 20
MAX_PENDING_BYTES = 64 << 20
"""Bodies that may wait for the disk in memory, of all calls together."""
_SPOOL = ("spool", "invocation-logs")
MEMORY_FULL, SPOOL_FULL, DISK, UNWRITABLE = "memory-full", "spool-full", "disk-error", "unwritable"
"""Why a record is dropped."""
_REASONS = {
    MEMORY_FULL: f"the disk is so slow that more than {MAX_PENDING_BYTES >> 20} MiB wait for it",
    SPOOL_FULL: "as many records as invocation_log_spool_bytes allows wait for the object store",
}


@dataclass(frozen=True)
class Pending:
    """A record that is not built yet."""

    account: str
    region: str
    num_bytes: int
    """About what it holds in memory."""
    build: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class _Kept:
    """Whether an account's calls are logged, and when that was looked up."""

    config: Mapping[str, Any] | None
    looked_up_at: float


def spool_folder(settings: Settings) -> Path:
    """Return where records wait to be sent on."""
    return settings.data_dir.joinpath(*_SPOOL)


class InvocationLog:
    """Takes records from any thread; keeps, sends and counts them."""

    def __init__(
        self, settings: Settings, engine: Engine, objects: Callable[[], ObjectStore]
    ) -> None:
        """
        Args:
            objects: gives the object store as it is now; may raise ObjectStoreError.
        """
        self._settings, self._engine = settings, engine
        self._configs: dict[tuple[str, str], _Kept] = {}
        self._queue: queue.SimpleQueue[tuple[Pending, Future[None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._counted: dict[CountKey, Counted] = {}
        self._is_due = threading.Event()
        self._is_ending = threading.Event()
        folder = spool_folder(settings)
        self._writer = SpoolWriter(
            folder, max_bytes=settings.invocation_log_spool_bytes, segment_bytes=SEGMENT_BYTES
        )
        self._shipper = Shipper(settings, engine, objects, folder, self.count)

    def configuration(self, account: str, region: str) -> Mapping[str, Any] | None:
        """Return how an account's calls are logged; None where they are not.

        A database that does not answer does not matter to the call: what was known last counts.
        """
        kept = self._configs.get((account, region))
        if kept is not None and time.monotonic() - kept.looked_up_at < CONFIG_SECONDS:
            return kept.config
        try:
            with self._engine.connect() as connection:
                config = invocation_logging.get_config(connection, account, region)
        except SQLAlchemyError:
            logger.exception("whether calls are logged could not be looked up")
            return kept.config if kept else None
        self._configs[account, region] = _Kept(config, time.monotonic())
        return config

    def forget_configuration(self, account: str, region: str) -> None:
        """Look a configuration up again at the next call: it was changed."""
        self._configs.pop((account, region), None)

    def put(self, pending: Pending) -> Future[None]:
        """Hand a record over; never waits. The result is there once it is kept or dropped."""
        done: Future[None] = Future()
        with self._lock:
            is_full = self._pending_bytes + pending.num_bytes > MAX_PENDING_BYTES
            if not is_full:
                self._pending_bytes += pending.num_bytes
        if is_full:
            self._drop(pending, MEMORY_FULL)
            done.set_result(None)
        else:
            self._queue.put((pending, done))
        return done

    async def put_and_wait(self, pending: Pending) -> None:
        """Hand a record over and wait a moment until the spool has it."""
        done = self.put(pending)
        with anyio.move_on_after(PATIENCE_SECONDS):
            # Shielded: who waits no longer leaves the record in the queue.
            await asyncio.shield(asyncio.wrap_future(done))

    def count(self, key: CountKey, number: int, detail: str) -> None:
        """Count what came of records; written by the sending thread."""
        with self._lock:
            before = self._counted.get(key, Counted(0, ""))
            self._counted[key] = Counted(before.number + number, detail)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep and send for the length of a `with` block; what is not sent waits for the next."""
        # Daemons, and joined for a while only: neither a disk nor a store that hangs keeps the
        # gateway from its end.
        writing, sending = (
            threading.Thread(target=target, name=f"invocation-log-{name}", daemon=True)
            for target, name in ((self._keep_writing, "writer"), (self._keep_sending, "sender"))
        )
        writing.start()
        sending.start()
        try:
            yield
        finally:
            self._queue.put(None)
            writing.join(END_SECONDS)
            self._is_ending.set()
            self._is_due.set()
            sending.join(END_SECONDS)  # a segment that is left behind is not lost

    # -- the writing thread

    def _keep_writing(self) -> None:
        synced_at = time.monotonic()
        while True:
            item = None
            with suppress(queue.Empty):
                item = self._queue.get(timeout=SYNC_SECONDS / 2)
                if item is None:
                    break
            if item is not None:
                self._keep(*item)
            if time.monotonic() - synced_at >= SYNC_SECONDS:
                synced_at = time.monotonic()
                self._settle(self._writer.sync)
            age = self._writer.age_seconds
            if age is not None and age >= self._settings.invocation_log_seconds:
                self._settle(self._writer.close)
                self._is_due.set()
        self._settle(self._writer.close)

    def _keep(self, pending: Pending, done: Future[None]) -> None:
        try:
            record = json.dumps(pending.build(), ensure_ascii=False, separators=(",", ":"))
            self._writer.append(record.encode("utf-8", "replace"))
        except SpoolFullError:
            self._drop(pending, SPOOL_FULL)
        except OSError as error:
            self._drop(pending, DISK, error.strerror or str(error))
        except Exception as error:
            logger.exception("a record of an invocation could not be written")
            self._drop(pending, UNWRITABLE, type(error).__name__)
        finally:
            with self._lock:
                self._pending_bytes -= pending.num_bytes
            done.set_result(None)

    def _settle(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError:
            logger.exception("the spool of invocation logs could not be brought to the disk")

    def _drop(self, pending: Pending, outcome: str, detail: str = "") -> None:
        key = CountKey(pending.account, pending.region, CHANNEL, outcome)
        self.count(key, 1, detail or _REASONS.get(outcome, outcome))

    # -- the sending thread

    def _keep_sending(self) -> None:
        while not self._is_ending.is_set():
            self._is_due.wait(SYNC_SECONDS)
            self._is_due.clear()
            try:
                self._shipper.ship()
            except Exception:  # whatever it is, the next round finds the same segments
                logger.exception("invocation logs could not be sent; it is tried again")
            self.flush_counts()

    def flush_counts(self) -> None:
        """Write what was counted; what could not be written stays counted."""
        with self._lock:
            counted, self._counted = self._counted, {}
        for key, (number, detail) in counted.items():
            if key.outcome in (MEMORY_FULL, SPOOL_FULL, DISK, UNWRITABLE):
                logger.warning("%d invocation(s) were not logged: %s", number, detail)
        if not counted:
            return
        try:
            with transaction(self._engine) as connection:
                add_counts(connection, counted)
        except SQLAlchemyError:  # a full disk, or a database that is away
            logger.exception("counts of invocation logs could not be written; it is tried again")
            for key, (number, detail) in counted.items():
                self.count(key, number, detail)
