"""A file of weights is believed only where all that its header says can be true."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import save_file

from outcrop.errors import ModelError
from outcrop.models import safetensors_header
from outcrop.models.safetensors_header import TensorEntry, read_header

WHERE = "s3://bucket/model/model.safetensors"
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def read(content: bytes) -> dict[str, TensorEntry]:
    return read_header(io.BytesIO(content), len(content), WHERE)


def file_of(table: Any, data: int = 32) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def with_b(**changes: Any) -> bytes:
    return file_of({**GOOD, "b": {**GOOD["b"], **changes}})


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(2, 5), "y": torch.zeros(3, dtype=torch.float16)}, path)
    found = read(path.read_bytes())
    assert found == {
        "x": TensorEntry("F32", (2, 5), 40),
        "y": TensorEntry("F16", (3,), 6),
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes; a safetensors file has at least 8"),
        (file_of(GOOD)[:60], "says that its header has 129 bytes, but only 52 follow"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header has 1,152,921,504,606,846,976 bytes"),
        (b"PK\3\4" + bytes(60), "not a safetensors file"),
        (file_of(b"[1]"), "not a JSON object"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of({}), "holds no tensors"),
        (file_of(b'{"a": 1, "a": 2}'), "has a twice"),
        (file_of({"a": 3}), "tensor a must have dtype, shape and data_offsets"),
        (with_b(dtype="BF17"), "tensor b has the dtype BF17; known are F64"),
        (with_b(dtype=["F32"]), "known are"),
        (with_b(shape=[-4]), "tensor b has the shape [-4]"),
        (with_b(shape=[2.0, 2]), "has the shape [2.0, 2]"),
        (with_b(shape=[True]), "has the shape [True]"),
        (with_b(shape=[1] * 9), "up to 8 whole numbers"),
        (with_b(data_offsets=[32, 24]), "must be a beginning and an end"),
        (with_b(data_offsets=[24, 40]), "has 16 bytes (data_offsets [24, 40]); BF16 of shape [4]"),
        (with_b(data_offsets=[16, 24]), "tensor b begins at byte 16 of the data, inside a"),
        (with_b(data_offsets=[28, 36]), "4 bytes before the tensor b belong to no tensor"),
        (file_of(GOOD, 31), "has 31 bytes of data where its header says 32"),
        (file_of(GOOD, 40), "has 40 bytes of data where its header says 32"),
    ],
)
def test_what_cannot_be_true_is_refused_by_file_and_tensor(content: bytes, says: str) -> None:
    with pytest.raises(ModelError) as refused:
        read(content)
    assert says in str(refused.value)
    assert str(refused.value).startswith((WHERE, f"The header of {WHERE}"))


def test_a_huge_header_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ModelError, match="has a header of 129 bytes; 100 are allowed"):
        read(file_of(GOOD))


@given(some.binary(max_size=200))
def test_no_file_is_more_than_refused(content: bytes) -> None:
    with suppress(ModelError):
        read(content)


@given(some.integers(0, 151), some.binary(min_size=1, max_size=4))
def test_no_damage_is_more_than_refused(place: int, damage: bytes) -> None:
    content = bytearray(file_of(GOOD))
    content[place : place + len(damage)] = damage
    with suppress(ModelError):
        read(bytes(content))
