"""What is brought to the disk, in order: no test can cut the power, but it can watch the syncs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


def record_syncs(
    monkeypatch: pytest.MonkeyPatch, note: Callable[[Path], None] = lambda path: None
) -> list[Path]:
    """Return a list that grows by each path that Python code syncs; `note` is called before it."""
    found: list[Path] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        note(path)
        found.append(path)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return found
