"""What a custom model's folder holds, and how a new one gets an old one's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from outcrop.errors import ModelError
from outcrop.models.artifact import Artifact, copy_weights, folder_digest, read_artifact


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_an_adapter_a_whole_model_and_both_are_told_apart(tmp_path: Path) -> None:
    adapter = put(tmp_path / "a", "adapter_config.json")
    whole = put(tmp_path / "b", "config.json", "model.safetensors")
    both = put(tmp_path / "c", "config.json", "adapter/adapter_config.json")
    assert read_artifact(adapter) == Artifact(None, adapter)
    assert read_artifact(whole) == Artifact(whole, None)
    assert read_artifact(both) == Artifact(both, both / "adapter")


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither an adapter nor a whole model"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("can_link", [True, False])
def test_weights_outlive_the_folder_they_came_from_and_bring_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("no links here")

    if not can_link:
        monkeypatch.setattr("os.link", refuse)
    old = put(tmp_path / "old", "config.json", "model.safetensors", "adapter/adapter_config.json")
    copy_weights(old, tmp_path / "new")
    shutil.rmtree(old)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert (tmp_path / "new" / "model.safetensors").read_text() == "model.safetensors"


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "a", "b/c"), put(tmp_path / "two", "a", "b/c")
    assert folder_digest(one) == folder_digest(two)
    (two / "b" / "c").write_text("other")
    assert folder_digest(one) != folder_digest(two)
    (two / "b" / "c").write_text("b/c")
    (two / "a").rename(two / "d")
    assert folder_digest(one) != folder_digest(two)
