"""Matrices in the order in which the compiled pass multiplies them, in 32, 16, 8 or 4 bits.

A matrix (O, I) becomes strips of 16 of its rows; rows that lack to a whole strip are noughts.
`forward.c` says how each format lies in a strip. 8 bits are a scale for 64 numbers of a row, times
-127 to 127; 4 bits are the least of 32 numbers of a row, and a scale times 0 to 15. Scales and
least numbers are bfloat16. Compiled code packs few bits (`forward.pack_few_bits`).

Axis suffixes: O outputs, I inputs, S strips, C the 16 columns of one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 16
"""Columns of a matrix that lie together."""
FORMATS = ("bfloat16", "float32", "int8", "int4")
"""As `forward.c` counts them."""
INT8_GROUP, INT4_GROUP = 64, 32
Room = Callable[[int], Tensor]
"""Gives memory: so many bytes."""


class MatrixStruct(ctypes.Structure):
    """A matrix as the pass is given it."""

    _fields_ = (("data", ctypes.c_void_p), ("format", ctypes.c_int64))


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in strips."""

    data: Tensor
    """Bytes."""
    format: str

    @property
    def num_bytes(self) -> int:
        """Memory of it."""
        return self.data.nbytes

    def struct(self) -> MatrixStruct:
        """Return what the pass is given; this object must outlive it."""
        return MatrixStruct(self.data.data_ptr(), FORMATS.index(self.format))


def pack_matrix(matrix_OI: Tensor, format: str, room: Room | None = None) -> PackedMatrix:
    """Return a matrix in strips.

    Args:
        matrix_OI: I is even.
        format: bfloat16 or float32.
        room: where to put it.
    """
    more = -matrix_OI.shape[0] % STRIP
    wide_OI = torch.nn.functional.pad(matrix_OI, (0, 0, 0, more)) if more else matrix_OI
    packed = _PACKS[format](wide_OI.view(-1, STRIP, wide_OI.shape[1]))
    data = (room or aligned_room)(packed.nbytes)
    data.view(packed.dtype).view(packed.shape).copy_(packed)
    return PackedMatrix(data, format)


def unpack_matrix(packed: PackedMatrix, outputs: int, inputs: int) -> Tensor:
    """Return the matrix (O, I), float32, that a pass multiplies with."""
    strips = -(-outputs // STRIP)
    if packed.format == "bfloat16":
        pairs = packed.data.view(torch.bfloat16).view(strips, inputs // 2, STRIP, 2)
        return pairs.transpose(1, 2).reshape(-1, inputs)[:outputs].float()
    if packed.format == "float32":
        wide = packed.data.view(torch.float32).view(strips, inputs, STRIP)
        return wide.transpose(1, 2).reshape(-1, inputs)[:outputs]
    if packed.format == "int8":
        groups = packed.data.view(strips, -1, 2 * STRIP + INT8_GROUP * STRIP)
        scale = groups[..., : 2 * STRIP].contiguous().view(torch.bfloat16).float()
        numbers = groups[..., 2 * STRIP :].contiguous().view(torch.int8)
        wide = numbers.view(strips, -1, INT8_GROUP, STRIP) * scale[:, :, None]
    else:
        groups = packed.data.view(strips, -1, 4 * STRIP + INT4_GROUP // 2 * STRIP)
        shared = groups[..., : 4 * STRIP].contiguous().view(torch.bfloat16).float()
        both = groups[..., 4 * STRIP :].view(strips, -1, INT4_GROUP // 2, 1, STRIP)
        numbers = torch.cat((both & 15, both >> 4), dim=3).reshape(strips, -1, INT4_GROUP, STRIP)
        wide = numbers * shared[:, :, None, :STRIP] + shared[:, :, None, STRIP:]
    return wide.permute(0, 3, 1, 2).reshape(strips * STRIP, -1)[:outputs, :inputs]


def few_bits_bytes(outputs: int, inputs: int, format: str) -> int:
    """Return the size of a matrix in 8 or 4 bits."""
    group, more = (INT8_GROUP, 2) if format == "int8" else (INT4_GROUP, 4)
    numbers = group if format == "int8" else group // 2
    return -(-outputs // STRIP) * -(-inputs // group) * (numbers + more) * STRIP


def aligned_room(num_bytes: int) -> Tensor:
    """Return so many bytes, not yet written, that begin at a multiple of 64."""
    room = torch.empty(num_bytes + 64, dtype=torch.uint8)
    first = -room.data_ptr() % 64
    return room[first : first + num_bytes]


def is_bfloat16(matrix: Tensor) -> bool:
    """Return whether bfloat16 holds every number of a tensor."""
    return matrix.dtype == torch.bfloat16 or bool(
        torch.equal(matrix, matrix.to(torch.bfloat16).to(matrix.dtype))
    )


def _pack_bfloat16(wide_SCI: Tensor) -> Tensor:
    # A pair of numbers moves as one: several times as fast.
    return wide_SCI.to(torch.bfloat16).contiguous().view(torch.int32).transpose(1, 2)


def _pack_float32(wide_SCI: Tensor) -> Tensor:
    return wide_SCI.float().transpose(1, 2)


_PACKS = {"bfloat16": _pack_bfloat16, "float32": _pack_float32}
