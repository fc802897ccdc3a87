"""`outcrop serve`: the whole service on one machine.

Locks the data directory, brings the database up to date, and then supervises the object store,
the gateway, a worker, and one model server for each base model in use. It decides nothing about
requests or jobs: what it does comes from rows that others wrote, and whatever it supervises may
be killed at any instant.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.identity.bootstrap import bootstrap
from outcrop.meter.prices import load_prices
from outcrop.models.catalog import load_catalog
from outcrop.objects import embedded
from outcrop.processes.address import GATEWAY, clear_address, write_address
from outcrop.processes.spawn import READY_LINE, ChildSpec
from outcrop.processes.supervise import ChildState, ChildStatus, Supervisor, describe_exit
from outcrop.serve.vllm_library import check_engine_setting
from outcrop.settings import Settings, child_environment
from outcrop.store import jobs, readiness, servers
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.lock import lock_data_dir
from outcrop.store.rows import ModelServer

logger = logging.getLogger("outcrop.serve")

START_SECONDS = 60.0
MODEL_SECONDS = 300.0
"""How long a model server may take to be up: the first one of a model converts its weights."""
STOP_SECONDS = 9.0
"""In total, for all processes; SIGTERM is promised to take at most 10 s."""
LOOK_SECONDS = 0.1
"""How often the rows of wanted model servers are looked at."""
MAX_KILLED_STARTS = 3
"""A model server that was killed while it loaded is started again; after so many times in a row
its requests are told so. One that ends by itself has a reason, which is told at once."""
RECENT_SECONDS = 10.0
"""A model server that was used within so many seconds, and is killed, is started again at once."""
FIRST_CLEANING_SECONDS, CLEANING_SECONDS = 60.0, 3600.0
"""When `outcrop gc` runs by itself after the start, and how often from then on."""
STORE, WORKER, CLEANING = embedded.NAME, "worker", "gc"


def run_service(settings: Settings, on_ready: Callable[[str], None]) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. A start is given up at once by either.

    Args:
        settings: their data directory is there.
        on_ready: called once with the service's URL; not called where the start was given up.
    Raises:
        StoreError: the data directory is in use by another service, or its database is newer than
            this code.
        ChildError: a part of the service could not be started; the message has the end of its log.
        SettingsError: the engine that is to serve is not installed, or the price book cannot be
            used.
    """
    check_engine_setting(settings.serve_engine)
    load_prices(settings.price_book, load_catalog(settings).all_ids)
    asked: list[int] = []
    # Until there are processes to end, it just ends; SIGINT is a KeyboardInterrupt by itself.
    signal.signal(signal.SIGTERM, _end)
    with (
        lock_data_dir(settings.data_dir),
        tempfile.TemporaryDirectory(prefix="outcrop-") as sockets,
    ):
        engine = connect(settings.effective_database_url)
        migrate(engine, settings.data_dir / "backups")
        bootstrap(engine, settings)
        service = _Service(settings, engine, Path(sockets))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: asked.append(number))
        try:
            if service.start(give_up=lambda: bool(asked)):
                on_ready(service.url)
                service.supervisor.run(lambda: bool(asked) or service.look())
        finally:
            service.stop()
            engine.dispose()
    return 0


class _Service:
    """The processes of one `serve`, and what is done when they come and go."""

    def __init__(self, settings: Settings, engine: Engine, sockets: Path) -> None:
        self.settings, self.engine, self.sockets = settings, engine, sockets
        self.supervisor = Supervisor(on_ready=self._on_ready, on_exit=self._on_exit)
        self.url = ""
        # Several machines may share a database; a worker is known by its machine.
        self.worker = f"{WORKER}@{socket.gethostname()}"
        self._looked_at = 0.0
        self._clean_at = time.monotonic() + FIRST_CLEANING_SECONDS
        self._number = 0
        self._failed_starts: Counter[str] = Counter()

    def start(self, give_up: Callable[[], bool]) -> bool:
        """Start everything but the model servers; returns whether all of it answers.

        Args:
            give_up: whether not to wait any longer.
        """
        with transaction(self.engine) as connection:
            # This process holds the lock, so no worker or model server of an earlier one can live.
            jobs.release_worker(connection, self.worker)
            servers.forget_all(connection)
        clear_address(self.settings.data_dir, GATEWAY)
        embedded_store = not self.settings.s3_endpoint_url
        if embedded_store:
            embedded.add_to(self.supervisor, self.settings)
        after = (STORE,) if embedded_store else ()
        self.supervisor.add(self._part(GATEWAY, ready=READY_LINE, after=after))
        self.supervisor.add(self._part(WORKER, "--name", self.worker))
        return self.supervisor.wait_ready(timeout=START_SECONDS, give_up=give_up)

    def stop(self) -> None:
        """End all processes; running jobs go back to the queue."""
        clear_address(self.settings.data_dir, GATEWAY)
        self.supervisor.stop_all(STOP_SECONDS)
        embedded.clean_up(self.settings)

    def look(self) -> bool:
        """Start the model servers that are wanted, end those that are idle. Returns False."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = now
        try:
            self._look()
        except SQLAlchemyError:  # a full disk or a database that is away: the service lives
            logger.exception("the database does not answer; trying again")
        return False

    def _look(self) -> None:
        with self.engine.connect() as connection:
            rows = servers.list_servers(connection)
            waiting = readiness.awaited_weights(connection)
        for key in waiting:
            self._serve_awaited(key, next((row for row in rows if row.key == key), None))
        for row in rows:
            self._reconcile(row)
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + CLEANING_SECONDS
            self._clean()

    def _clean(self) -> None:
        """Run `outcrop gc`, unless the one before still runs."""
        status = self.supervisor.status(CLEANING)
        if status is None or status.state is ChildState.ENDED:
            self.supervisor.remove(CLEANING)
            self.supervisor.add(self._part(CLEANING, restart=False))

    def _reconcile(self, row: ModelServer) -> None:
        """Bring a model server's process and its row together, whatever happened to either."""
        status = self.supervisor.status(_server_name(row.key))
        state = status.state if status is not None else ChildState.ENDED
        if row.state == "wanted" and status is None:
            self._start_server(row.key)
        elif row.state == "starting" and state is ChildState.READY:
            assert status is not None
            assert status.pid is not None
            with transaction(self.engine) as connection:
                servers.mark_ready(connection, row.key, status.pid)
                readiness.weights_are_served(connection, row.key)
            self._failed_starts.pop(row.key, None)
        elif row.state in ("starting", "ready") and state is ChildState.ENDED:
            self._server_ended(row, status)
        elif (
            state is ChildState.READY
            and servers.idle_seconds(row) > self.settings.model_idle_seconds
        ):
            logger.info("the model server of %s is idle and is ended", row.key)
            with transaction(self.engine) as connection:
                servers.remove(connection, row.key)
            self.supervisor.remove(_server_name(row.key))

    def _server_ended(self, row: ModelServer, status: ChildStatus | None) -> None:
        exit_code = status.exit_code if status is not None else None
        killed = exit_code is None or exit_code < 0
        if row.state == "starting":
            self._failed_starts[row.key] += 1
        again = row.state == "ready" or (
            killed and self._failed_starts[row.key] < MAX_KILLED_STARTS
        )
        with transaction(self.engine) as connection:
            if again:
                servers.remove(connection, row.key)
                if killed and row.state == "ready" and servers.idle_seconds(row) < RECENT_SECONDS:
                    # Who was answered asks again, so it is started before they come.
                    servers.want(connection, row.key)
            else:
                how = describe_exit(exit_code) if exit_code else "no trace"
                servers.mark_failed(connection, row.key, f"it ended with {how}")
                readiness.weights_failed(connection, row.key, "The model server did not start.")
                del self._failed_starts[row.key]
        self.supervisor.remove(_server_name(row.key))

    def _serve_awaited(self, key: str, row: ModelServer | None) -> None:
        """End the wait of throughputs and deployments whose server is up, else ask for it."""
        with transaction(self.engine) as connection:
            if row is not None and row.state == "ready":
                readiness.weights_are_served(connection, key)
            elif row is None:
                servers.want(connection, key)

    def _start_server(self, key: str) -> None:
        self._number += 1
        address = self.sockets / f"{self._number}.sock"
        arguments = ("--weights", key, "--socket", str(address))
        with transaction(self.engine) as connection:
            servers.mark_starting(connection, key, str(address))
        self.supervisor.add(
            self._part(
                "model-server",
                *arguments,
                name=_server_name(key),
                ready=READY_LINE,
                ready_seconds=MODEL_SECONDS,
                restart=False,
            )
        )

    def _part(
        self,
        command: str,
        *arguments: str,
        name: str | None = None,
        ready: str | None = None,
        ready_seconds: float = START_SECONDS,
        after: tuple[str, ...] = (),
        restart: bool = True,
    ) -> ChildSpec:
        name = name or command
        return ChildSpec(
            name=name,
            command=(sys.executable, "-m", "outcrop", command, *arguments),
            log_file=self.settings.data_dir / "logs" / f"{name.replace(':', '-')}.log",
            environment=child_environment(self.settings),
            ready=ready,
            ready_seconds=ready_seconds,
            after=after,
            restart=restart,
            keep_log_bytes=self.settings.keep_log_bytes,
        )

    def _on_ready(self, status: ChildStatus) -> None:
        if status.name == GATEWAY:
            self.url = status.ready_line
            assert status.pid is not None
            try:
                write_address(self.settings.data_dir, GATEWAY, self.url, status.pid)
            except OSError:  # a full disk: the gateway answers all the same
                logger.exception("`outcrop env` will not know the gateway's address")

    def _on_exit(self, status: ChildStatus) -> None:
        if status.name == WORKER:
            try:
                with transaction(self.engine) as connection:
                    released = jobs.release_worker(connection, self.worker)
            except SQLAlchemyError:  # its leases run out by themselves
                logger.exception("the jobs of the ended worker could not be released")
            else:
                logger.info("%d job(s) of the ended worker go back to the queue", released)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _server_name(key: str) -> str:
    return f"model-server:{key}"
