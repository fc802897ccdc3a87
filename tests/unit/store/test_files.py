"""Private files: whole or not at all, on the disk before anything relies on them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from outcrop.store.files import sync_tree, write_private


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Each path that is synced, and whether `secret` had its name by then."""
    found: list[tuple[str, bool]] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        folder = path if path.is_dir() else path.parent
        found.append((path.name, (folder / "secret").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return found


@pytest.mark.parametrize("replace", [False, True])
def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, synced: list[tuple[str, bool]], replace: bool
) -> None:
    assert write_private(tmp_path / "secret", b"x", replace=replace)
    (content, named_then), (folder, named_at_last) = synced
    assert content.startswith(".secret.")
    assert not named_then
    assert (folder, named_at_last) == (tmp_path.name, True)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


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


def test_tree_is_synced_to_its_last_file(tmp_path: Path, synced: list[tuple[str, bool]]) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name)
    sync_tree(tmp_path)
    assert {name for name, _ in synced} == {"a", "b", "inner", tmp_path.name}
