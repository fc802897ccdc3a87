"""The table at the start of a safetensors file, read with distrust and without its tensors.

A file begins with the length of its header (8 bytes, little endian), then the header, one JSON
object of name -> dtype, shape and place, then the tensors' bytes, one after the other. All of what
the header says is held against the size of the file before any of it is believed.

Source: the safetensors format's description; its own limit of a header is 100 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NoReturn

from outcrop.errors import ModelError

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""LIMIT: ours; enough for 100,000 tensors. The largest models that are published have a tenth."""
MAX_DIMENSIONS = 8
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""What the format knows, in bytes a number."""
_ENTRY = {"dtype", "shape", "data_offsets"}
_SHOWN = 80


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(stream: BinaryIO, size: int, where: str) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name; nothing behind the header is read.

    Args:
        stream: at the file's beginning.
        size: bytes of the whole file.
        where: names the file in errors.
    Raises:
        ModelError: the file is cut off, is none, or says what cannot be true; the message names
            the tensor and the value.
    """
    start = stream.read(8)
    if len(start) < 8:
        raise ModelError(f"{where} has {size} bytes; a safetensors file has at least 8.")
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise ModelError(
            f"{where} says that its header has {length:,} bytes, but only {size - 8:,} follow: it "
            "is cut off, or is not a safetensors file."
        )
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{where} has a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed."
        )
    table = _parse(stream.read(length), where)
    table.pop("__metadata__", None)
    if not table:
        raise ModelError(f"{where} holds no tensors.")
    entries = {name: _entry(name, value, where) for name, value in table.items()}
    _check_places(
        ((name, *table[name]["data_offsets"]) for name in table), size - 8 - length, where
    )
    return entries


def _parse(text: bytes, where: str) -> dict[str, Any]:
    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ModelError(f"The header of {where} has {_short(name)} twice.")
            found[name] = value
        return found

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"The header of {where} is not JSON: {error}. It is not a safetensors file."
        ) from None
    if not isinstance(table, dict):
        raise ModelError(f"The header of {where} is not a JSON object.")
    return table


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    def refuse(what: str) -> NoReturn:
        raise ModelError(f"{where}: the tensor {_short(name)} {what}.")

    if not isinstance(value, dict) or set(value) != _ENTRY:
        refuse("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        refuse(f"has the dtype {_short(dtype)}; known are {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        refuse(
            f"has the shape {_short(shape)}; it must be up to {MAX_DIMENSIONS} whole numbers from 0"
        )
    if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
        refuse(f"has the data_offsets {_short(place)}; they must be a beginning and an end")
    wanted = prod(shape) * DTYPE_BYTES[dtype]
    if place[1] - place[0] != wanted:
        refuse(
            f"has {place[1] - place[0]:,} bytes (data_offsets {place}); {dtype} of shape {shape} "
            f"is {wanted:,}"
        )
    return TensorEntry(dtype, tuple(shape), wanted)


def _check_places(places: Iterable[tuple[str, int, int]], size: int, where: str) -> None:
    """Refuse tensors that overlap, leave a gap, or end elsewhere than the file does."""
    last_name, end = "the header", 0
    for name, start, stop in sorted(places, key=lambda place: place[1:]):
        if start < end:
            raise ModelError(
                f"{where}: the tensor {_short(name)} begins at byte {start:,} of the data, inside "
                f"{_short(last_name)}, which ends at {end:,}."
            )
        if start > end:
            raise ModelError(
                f"{where}: {start - end:,} bytes before the tensor {_short(name)} belong to no "
                "tensor."
            )
        last_name, end = name, stop
    if end != size:
        raise ModelError(
            f"{where} has {size:,} bytes of data where its header says {end:,}: it is cut off or "
            "damaged."
        )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62
        for item in value
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
