"""Private files: whole or not at all, on the disk before anything relies on them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tests.unit.store.syncs import record_syncs

from outcrop.store.files import sync_tree, write_private


@pytest.mark.parametrize("replace", [False, True])
def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    file = tmp_path / "secret"
    named: list[bool] = []
    synced = record_syncs(monkeypatch, lambda path: named.append(file.exists()))
    assert write_private(file, b"x", replace=replace)
    content, folder = synced
    assert content.name.startswith(".secret.")
    assert folder == tmp_path
    assert named == [False, True]
    assert list(tmp_path.iterdir()) == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_file_that_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert write_private(file, b"first")
    assert not write_private(file, b"second")
    assert file.read_bytes() == b"first"
    assert write_private(file, b"third", replace=True)
    assert file.read_bytes() == b"third"
    assert list(tmp_path.iterdir()) == [file]


def test_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_private(tmp_path / "folder", b"x", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_tree_is_synced_to_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    files = [tmp_path / "a", tmp_path / "inner" / "b"]
    for file in files:
        file.write_text("x")
    synced = record_syncs(monkeypatch)
    sync_tree(tmp_path)
    assert set(synced) == {*files, tmp_path / "inner", tmp_path}
