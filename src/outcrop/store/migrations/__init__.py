"""The steps from one schema to the next, in order; a step that has landed is never changed.

The first makes every table as tables.py had it then. A later change of tables.py comes with a module of its own here.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from outcrop.store.migrations import m0001_first

MIGRATIONS: tuple[Callable[[Connection], None], ...] = (m0001_first.apply,)
