"""Packed matrices on disk: the same bytes as packed anew, or none at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.serve.tiny_chat import write_tiny_chat

from outcrop.serve.forward import is_compiled
from outcrop.serve.kept import KeptMatrices, key_of
from outcrop.serve.network import read_config, read_weights
from outcrop.serve.packed import pack_model, read_shape
from outcrop.serve.paged import PagedBackend

GIVEN = {
    "0.qkv": ("bfloat16", memoryview(bytes(range(256)) * 40)),
    "lm_head": ("int8", memoryview(b"abc")),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "packed" / "model-auto"


def read(file: Path, key: str = "key") -> dict[str, tuple[str, bytes]]:
    found = KeptMatrices(file, key).read()
    return {name: (format, bytes(data)) for name, (format, data) in found.items()}


def test_what_is_kept_is_read_as_it_was_written(file: Path) -> None:
    assert read(file) == {}
    KeptMatrices(file, "key").write(GIVEN)
    assert read(file) == {name: (format, bytes(data)) for name, (format, data) in GIVEN.items()}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_was_made_of_something_else_is_not_used_and_is_replaced(file: Path) -> None:
    KeptMatrices(file, "key").write(GIVEN)
    assert read(file, "another") == {}
    KeptMatrices(file, "another").write(GIVEN)
    assert read(file, "another")
    assert read(file) == {}


def cut(content: bytes) -> bytes:
    return content[:-1]


def longer(content: bytes) -> bytes:
    return content + b"x"


def changed_last(content: bytes) -> bytes:
    return content[:-1] + b"x"


def changed_head(content: bytes) -> bytes:
    return content[:50] + b"x" + content[51:]


def changed_size(content: bytes) -> bytes:
    return content[:32] + b"\xff" * 8 + content[40:]


def nothing(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, longer, changed_last, changed_head, changed_size, nothing])
def test_a_damaged_file_is_not_used_and_goes(
    file: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    KeptMatrices(file, "key").write(GIVEN)
    file.write_bytes(damage(file.read_bytes()))
    assert read(file) == {}
    assert "made anew" in caplog.text
    assert not file.exists()


def test_what_a_killed_process_left_is_removed(file: Path) -> None:
    file.parent.mkdir()
    (file.parent / f".{file.name}.half").write_bytes(b"half")
    KeptMatrices(file, "key").write(GIVEN)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_place_that_cannot_be_written_is_only_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "packed").write_bytes(b"")
    KeptMatrices(tmp_path / "packed" / "model", "key").write(GIVEN)
    assert "could not be kept" in caplog.text


def test_the_key_changes_with_the_weights_and_the_precision(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path / "model")
    before = key_of(folder, "auto")
    assert key_of(folder, "auto") == before
    assert key_of(folder, "int8") != before
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))
    assert key_of(folder, "auto") != before


@pytest.mark.skipif(not is_compiled(), reason="no C compiler")
@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_a_second_start_has_the_bytes_of_the_first_without_packing(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_chat(tmp_path / "model")
    config = read_config(folder)
    shape = read_shape(config)
    assert shape is not None
    packed = pack_model(config, shape, read_weights(folder), precision).matrices

    def kept() -> KeptMatrices:
        return KeptMatrices(tmp_path / "kept", key_of(folder, precision))

    def write_now(own: KeptMatrices, matrices: object) -> None:
        own.write(matrices)  # type: ignore[arg-type]

    monkeypatch.setattr(KeptMatrices, "write_later", write_now)
    PagedBackend(folder, threads=1, precision=precision, kept=kept()).close()

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a matrix was packed anew")

    monkeypatch.setattr("outcrop.serve.packed._pack", refuse)
    second = PagedBackend(folder, threads=1, precision=precision, kept=kept())
    found = second._base.matrices
    second.close()
    assert found.keys() == packed.keys()
    for name, matrix in packed.items():
        assert found[name].format == matrix.format
        assert torch.equal(found[name].data, matrix.data)
