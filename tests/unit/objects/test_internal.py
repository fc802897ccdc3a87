"""The keys to the objects are on the disk before an object can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.store.syncs import record_syncs

from outcrop.objects.internal import make_internal_keys, secrets_folder


def test_new_keys_are_synced_with_every_folder_that_leads_to_them(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = secrets_folder(data_dir)
    synced = record_syncs(monkeypatch)
    keys = make_internal_keys(data_dir)
    assert {data_dir, folder.parent, folder} <= set(synced)
    assert any(path.name.startswith(".keys.json.") for path in synced)
    assert make_internal_keys(data_dir) == keys
