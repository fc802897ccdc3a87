"""The compiled pass over the rows of many sequences, as Python calls it.

`forward.c` has the arithmetic. This holds the structs it is given, in the same order, and the
memory they point to: whoever passes one on keeps what it points to.

Axis suffixes: V vocabulary, N rows whose scores are wanted.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from outcrop.models.compiled import NoCompilerError, load_library
from outcrop.serve.formats import (
    FORMATS,
    STRIP,
    MatrixStruct,
    PackedMatrix,
    Room,
    aligned_room,
    few_bits_bytes,
)
from outcrop.serve.kept import wide_memory
from outcrop.serve.sampler import Draw

logger = logging.getLogger("outcrop.model-server")

FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-Wno-psabi", "-pthread"),
)
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
PAGE_TOKENS = 16
WIDEST_HEAD = 256
MOST_SHARED_HEADS = 48
"""Heads that share keys, at most."""
LINEARS = ("qkv", "out", "gate_up", "down")
LOOKS = 2000
"""How often a thread looks whether the others have come before it sleeps: some 30 microseconds."""

_Number, _Address = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        ("norms", _Address * 2),
        ("qkv_bias", _Address),
        ("query_norm", _Address),
        ("key_norm", _Address),
        ("matrices", MatrixStruct * 4),
    )


class _ChangeLayer(ctypes.Structure):
    _fields_ = (("a", _Address * 4), ("b", _Address * 4))


class _Change(ctypes.Structure):
    _fields_ = (("rank", _Number), ("layers", _Address))


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in ("layers", "width", "inner", "heads", "groups", "head")),
        *(("vocabulary", _Number), ("window", _Number)),
        *(("epsilon", ctypes.c_double), ("scale", ctypes.c_double)),
        *((name, _Address) for name in ("layer", "final_norm", "cosines", "sines")),
        *(("embedding", MatrixStruct), ("lm_head", MatrixStruct)),
    )


class _Limits(ctypes.Structure):
    _fields_ = (("rows", _Number), ("changed", _Number), ("pages", _Number))


class _Sequence(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in ("first_row", "rows", "first_position")),
        *(("pages", _Address), ("adapter", _Address)),
    )


class _Draw(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "number")),
        ("top_k", _Number),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in ("rows", "sequences", "outputs")),
        *((name, _Address) for name in ("tokens", "sequence", "output_rows", "draws")),
        *((name, _Address) for name in ("logits", "chosen", "keys", "values")),
    )


_STRUCTS = (MatrixStruct, _Layer, _ChangeLayer, _Change, _Model, _Limits, _Sequence, _Draw, _Pass)


@dataclass(frozen=True)
class Shape:
    """What a decoder's matrices have in common; models of one shape can share a `Forward`."""

    layers: int
    width: int
    inner: int
    """A multiple of 16: narrower ones are packed with columns of noughts."""
    heads: int
    groups: int
    """Of heads that share keys and values."""
    head: int
    """Width of one."""
    vocabulary: int
    epsilon: float
    window: int
    """Keys that a query sees, itself included; 0 for all before it."""

    @property
    def stored_head(self) -> int:
        """Width of a head in a page."""
        return -(-self.head // STRIP) * STRIP

    @property
    def page_bytes(self) -> int:
        """Memory of a page's keys and values, of all layers."""
        return 2 * self.layers * self.groups * PAGE_TOKENS * self.stored_head * 2


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weights: norms and biases float32, matrices packed (`packed.py`)."""

    norms: tuple[Tensor, Tensor]
    matrices: tuple[PackedMatrix, PackedMatrix, PackedMatrix, PackedMatrix]
    """In the order of LINEARS."""
    qkv_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class PackedModel:
    """A model's weights as the pass takes them."""

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[PackedLayer],
        final_norm: Tensor,
        cosines: Tensor,
        sines: Tensor,
        lm_head: PackedMatrix,
        embedding: PackedMatrix | None,
    ) -> None:
        """
        Args:
            cosines, sines: (positions, half the width of a head), float32.
            embedding: None where `lm_head` is it too.
        """
        self.shape = shape
        self._kept = (tuple(layers), final_norm, cosines, sines, lm_head, embedding)
        self._layers = (_Layer * len(layers))(*(map(_layer, layers)))
        self._struct = _Model(
            *(shape.layers, shape.width, shape.inner, shape.heads, shape.groups, shape.head),
            *(shape.vocabulary, shape.window, shape.epsilon, shape.head**-0.5),
            *(ctypes.addressof(self._layers), _at(final_norm), _at(cosines), _at(sines)),
            *(MatrixStruct() if embedding is None else embedding.struct(), lm_head.struct()),
        )

    @property
    def address(self) -> int:
        """Where the struct lies."""
        return ctypes.addressof(self._struct)

    @property
    def matrices(self) -> dict[str, PackedMatrix]:
        """All matrices, by names of their own: the embedding only where `lm_head` is not it."""
        layers, _, _, _, lm_head, embedding = self._kept
        found = {
            f"{number}.{linear}": matrix
            for number, layer in enumerate(layers)
            for linear, matrix in zip(LINEARS, layer.matrices, strict=True)
        }
        found["lm_head"] = lm_head
        return found if embedding is None else {**found, "embedding": embedding}

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices and the embedding."""
        return sum(matrix.num_bytes for matrix in self.matrices.values())


class PackedAdapter:
    """An adapter as the pass takes it."""

    def __init__(self, rank: int, layers: Sequence[Sequence[tuple[Tensor, Tensor] | None]]) -> None:
        """
        Args:
            rank: even.
            layers: of each layer, for each of LINEARS: (A, B) packed, or None for no change.
        """
        self.rank = rank
        self._kept = tuple(tuple(linears) for linears in layers)
        self._layers = (_ChangeLayer * len(layers))(
            *(
                _ChangeLayer(
                    (_Address * 4)(*(_at(pair[0]) if pair else None for pair in linears)),
                    (_Address * 4)(*(_at(pair[1]) if pair else None for pair in linears)),
                )
                for linears in layers
            )
        )
        self._struct = _Change(rank, ctypes.addressof(self._layers))

    @property
    def address(self) -> int:
        """Where the struct lies."""
        return ctypes.addressof(self._struct)

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices."""
        return sum(
            a.nbytes + b.nbytes
            for linears in self._kept
            for pair in linears
            if pair is not None
            for a, b in (pair,)
        )


@dataclass(frozen=True)
class Rows:
    """The rows of one sequence in a pass."""

    token_ids: Sequence[int]
    first_position: int
    pages: ctypes.Array[ctypes.c_int32]
    """Its pages, by number, from its first token on; they cover this pass's rows."""
    adapter: PackedAdapter | None
    num_scores: int
    """Of so many of its last rows the scores of the tokens after them are wanted."""
    draw: Draw | None = None
    """How the token after the last one is drawn; None takes the likeliest."""


class Forward:
    """Threads, room and pages for passes over models of one shape. Used from one thread."""

    def __init__(
        self, model: PackedModel, *, threads: int, num_pages: int, max_rows: int, max_rank: int
    ) -> None:
        """
        Args:
            max_rows: of a pass.
            max_rank: of adapters.
        Raises:
            MemoryError: there is not enough memory, or a thread was refused.
        """
        shape = self.shape = model.shape
        self.max_rows, self.max_rank = max_rows, max_rank
        self._library = _library()
        assert self._library is not None
        size = num_pages * shape.page_bytes // 2
        self._keys, self._values = (wide_room(size).view(torch.bfloat16) for _ in range(2))
        widest = -(-3 * max_rank // STRIP) * STRIP
        self._engine = self._library.forward_open(
            model.address, ctypes.byref(_Limits(max_rows, widest, num_pages)), threads, LOOKS
        )
        if not self._engine:
            raise MemoryError("The memory or the threads of a model's passes were refused.")

    def run(self, model: PackedModel, parts: Sequence[Rows]) -> tuple[Tensor, list[int]]:
        """Add rows to their sequences.

        Returns:
            (logits_NV, chosen): for each row whose scores are wanted, in order, those of the next
            token, float32, and the token drawn, or -1 where a score is not a finite number.
        """
        count = sum(len(part.token_ids) for part in parts)
        assert 0 < count <= self.max_rows
        assert model.shape == self.shape
        tokens = (ctypes.c_int32 * count)(*(token for part in parts for token in part.token_ids))
        sequences = (_Sequence * len(parts))()
        outputs: list[int] = []
        draws: list[Draw | None] = []
        row = 0
        for place, part in enumerate(parts):
            adapter = None if part.adapter is None else part.adapter.address
            assert part.adapter is None or part.adapter.rank <= self.max_rank
            length = len(part.token_ids)
            sequences[place] = _Sequence(
                row, length, part.first_position, ctypes.addressof(part.pages), adapter
            )
            row += length
            outputs += range(row - part.num_scores, row)
            draws += [part.draw] * part.num_scores
        rows = (ctypes.c_int32 * len(outputs))(*outputs)
        chosen = (ctypes.c_int32 * len(outputs))()
        drawn = (_Draw * len(outputs))(*map(_draw, draws))
        logits_NV = torch.empty(len(outputs), self.shape.vocabulary)
        whole = _Pass(
            *(count, len(parts), len(outputs), ctypes.addressof(tokens)),
            *(ctypes.addressof(sequences), ctypes.addressof(rows), ctypes.addressof(drawn)),
            *(logits_NV.data_ptr(), ctypes.addressof(chosen)),
            *(self._keys.data_ptr(), self._values.data_ptr()),
        )
        assert self._library is not None
        self._library.forward_run(self._engine, model.address, ctypes.byref(whole))
        return logits_NV, list(chosen)

    def close(self) -> None:
        """End the threads and give the memory back."""
        assert self._library is not None
        self._library.forward_close(self._engine)


def draw_token(logits_V: Tensor, draw: Draw) -> int:
    """Draw a token as a pass does.

    Args:
        logits_V: finite scores, float32.
    """
    library = _library()
    assert library is not None
    scores_V = logits_V.float().contiguous()
    room = torch.empty(3, len(scores_V))  # a weight, and a candidate of twice its size, of each
    return int(
        library.forward_draw(
            *(scores_V.data_ptr(), len(scores_V), float(scores_V.max())),
            ctypes.byref(_draw(draw)),
            *(room.data_ptr(), room[1:].data_ptr()),
        )
    )


def is_compiled() -> bool:
    """Return whether passes can be computed by compiled code on this machine."""
    return _library() is not None


def rounds_rows() -> bool:
    """Return whether this machine's passes round a row's numbers to bfloat16 before a product."""
    library = _library()
    return library is not None and bool(library.forward_rounds())


def pack_few_bits(matrix_OI: Tensor, format: str, room: Room = aligned_room) -> PackedMatrix:
    """Return a matrix in strips, rounded to few bits a number.

    Args:
        matrix_OI: of finite numbers; I is even.
        format: int8 or int4.
        room: where to put it.
    """
    library = _library()
    assert library is not None
    outputs, inputs = matrix_OI.shape
    data = room(few_bits_bytes(outputs, inputs, format))
    wide_OI = matrix_OI.float().contiguous()
    number = FORMATS.index(format)
    library.forward_pack(wide_OI.data_ptr(), outputs, inputs, number, data.data_ptr())
    return PackedMatrix(data, format)


def wide_room(num_bytes: int) -> Tensor:
    """Return so many bytes in memory of their own, in large pages where the system has them."""
    return torch.frombuffer(wide_memory(num_bytes), dtype=torch.uint8, count=num_bytes)


def pages_of(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_int32]:
    """Return page numbers as a pass takes them."""
    found = list(numbers)
    return (ctypes.c_int32 * len(found))(*found)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = load_library("outcrop.serve", "forward.c", FLAGS, MACHINE_FLAGS)
    except NoCompilerError as error:
        logger.warning("%s: answers are slower, one after the other", error)
        return None
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("forward.c could not be compiled, answers are slower: %s", error)
        return None
    if library is None:
        return None
    library.forward_size.restype = ctypes.c_size_t
    library.forward_size.argtypes = [_Number]
    for place, struct in enumerate(_STRUCTS):
        assert library.forward_size(place) == ctypes.sizeof(struct), struct
    library.forward_rounds.restype = _Number
    library.forward_pack.restype = None
    library.forward_pack.argtypes = [_Address, _Number, _Number, _Number, _Address]
    library.forward_open.restype = _Address
    library.forward_open.argtypes = [_Address, _Address, _Number, _Number]
    library.forward_run.restype = library.forward_close.restype = None
    library.forward_run.argtypes = [_Address, _Address, _Address]
    library.forward_close.argtypes = [_Address]
    library.forward_draw.restype = ctypes.c_int32
    library.forward_draw.argtypes = [
        *(_Address, _Number, ctypes.c_float, _Address, _Address, _Address),
    ]
    return library


def _draw(draw: Draw | None) -> _Draw:
    if draw is None:
        return _Draw(0.0, 1.0, 0.0, 0)
    return _Draw(draw.temperature, draw.top_p, draw.number, draw.top_k or 0)


def _layer(layer: PackedLayer) -> _Layer:
    return _Layer(
        (_Address * 2)(*map(_at, layer.norms)),
        *(_at(layer.qkv_bias), _at(layer.query_norm), _at(layer.key_norm)),
        (MatrixStruct * 4)(*(matrix.struct() for matrix in layer.matrices)),
    )


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
