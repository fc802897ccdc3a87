"""What was read of the database, remembered until anybody commits a change to it.

Who asks a model is authenticated, authorized and resolved by rows that hardly ever change, and to
read them takes a third of what the gateway does for a request. SQLite tells a connection by a
number whether another one has committed something since, of any process; to ask for it takes some
5 microseconds. PostgreSQL has nothing like it, so there each read is made.

Source: sqlite.org, PRAGMA data_version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from sqlalchemy import Engine, PoolProxiedConnection

T = TypeVar("T")
MAX_ENTRIES = 10_000


class Remembered:
    """Results by key. Any thread may ask."""

    def __init__(self, engine: Engine | None = None) -> None:
        """
        Args:
            engine: of the database that is read; without one nothing is remembered.
        """
        is_sqlite = engine is not None and engine.dialect.name == "sqlite"
        self._engine = engine if is_sqlite else None
        self._watching: PoolProxiedConnection | None = None
        self._lock = threading.Lock()
        self._version: int | None = None
        self._found: dict[Hashable, Any] = {}

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what `read` returned for this key, or returns now; None is not remembered."""
        if self._engine is None:
            return read()
        with self._lock:
            version = self._look(self._engine)
            if version != self._version or len(self._found) >= MAX_ENTRIES:
                self._version, self._found = version, {}
            elif key in self._found:
                return cast(T, self._found[key])
            # What is committed while it is read comes with another number: then it is dropped.
            found = self._found
        value = read()
        if value is not None:
            found[key] = value
        return value

    def close(self) -> None:
        """Give the connection back; nothing is remembered any more."""
        with self._lock:
            self._engine, self._found = None, {}
            if self._watching is not None:
                self._watching.close()
                self._watching = None

    def _look(self, engine: Engine) -> int:
        if self._watching is None:
            self._watching = engine.raw_connection()
        cursor = self._watching.cursor()
        try:
            cursor.execute("PRAGMA data_version")
            row = cursor.fetchone()
        finally:
            cursor.close()
        assert row is not None
        return int(row[0])
