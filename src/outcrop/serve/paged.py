"""The backend on the compiled pass: all parts at once, whichever adapters they have.

Weights are held once, packed. Custom models that are an adapter are kept up to a number of bytes,
those with weights of their own likewise; the one that was not used for longest goes first. Parts of
models with own weights are a pass of their own, on the same pages.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from outcrop.errors import ModelError
from outcrop.models.artifact import check_digest, read_artifact
from outcrop.models.lora import load_adapter
from outcrop.serve.adapters import MAX_ADAPTER_BYTES, MAX_OWN_BYTES
from outcrop.serve.backend import Part, Scores
from outcrop.serve.formats import PackedMatrix
from outcrop.serve.forward import (
    PAGE_TOKENS,
    Forward,
    PackedAdapter,
    PackedModel,
    Rows,
    is_compiled,
    pages_of,
)
from outcrop.serve.kept import KeptMatrices
from outcrop.serve.network import default_device, read_config, read_weights, weight_bytes
from outcrop.serve.packed import pack_adapter, pack_model, read_shape

logger = logging.getLogger("outcrop.model-server")

MAX_ROWS = 256
"""Tokens of a pass: larger ones are no faster, and who waits for a token waits for a whole pass."""
MAX_PAGE_BYTES = 768 * 2**20
"""Of keys and values of all sequences: 34,000 tokens of the shipped model. Taken as it is used."""
MAX_RANK = 256
K = TypeVar("K", PackedAdapter, "OwnModel")


class OwnModel:
    """A custom model with weights of its own, and its adapter where it has one."""

    def __init__(self, model: PackedModel, adapter: PackedAdapter | None) -> None:
        self.model, self.adapter = model, adapter

    @property
    def num_bytes(self) -> int:
        """Memory of both."""
        return self.model.num_bytes + (self.adapter.num_bytes if self.adapter else 0)


def can_be_paged(folder: Path, dtype: torch.dtype | None) -> bool:
    """Return whether the compiled pass can serve the model of a folder on this machine.

    Args:
        dtype: of the weights, where somebody asks for one; the pass holds matrices in bfloat16.
    Raises:
        ModelError: the folder holds no model.
    """
    return (
        dtype in (None, torch.bfloat16)
        and default_device().type == "cpu"
        and read_shape(read_config(folder)) is not None
        and is_compiled()
    )


class PagedBackend:
    """See `backend.Backend`."""

    shares_pages = True
    page_tokens = PAGE_TOKENS

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        precision: str = "auto",
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
        max_own_bytes: int = MAX_OWN_BYTES,
        max_page_bytes: int = MAX_PAGE_BYTES,
        kept: KeptMatrices | None = None,
    ) -> None:
        """
        Args:
            folder: the base model's, in Hugging Face's layout, of which `can_be_paged` holds.
            precision: what matrices are held in, one of packed.PRECISIONS.
            kept: where the packed matrices are kept, if they are.
        Raises:
            ModelError: the folder's weights cannot be used.
        """
        config = read_config(folder)
        shape = read_shape(config)
        assert shape is not None
        self._shape, self._inner = shape, int(config["intermediate_size"])
        self.vocabulary = shape.vocabulary
        self.max_context = int(config["max_position_embeddings"])
        # One request must always fit, however long.
        most = max(max_page_bytes // shape.page_bytes, -(-self.max_context // PAGE_TOKENS))
        self.max_rows, self.num_pages = MAX_ROWS, most
        torch.set_num_threads(threads)
        self._precision = precision
        self._base = _pack_kept(folder, config, precision, kept)
        self._forward = Forward(
            self._base,
            threads=threads,
            num_pages=most,
            max_rows=self.max_rows,
            max_rank=MAX_RANK,
        )
        self._max_adapter_bytes, self._max_own_bytes = max_adapter_bytes, max_own_bytes
        self._adapters: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._own: OrderedDict[str, OwnModel] = OrderedDict()
        self.num_loads = 0

    @property
    def base_bytes(self) -> int:
        """See `Backend`."""
        return self._base.num_bytes

    @property
    def num_own(self) -> int:
        """See `Backend`."""
        return len(self._own)

    @property
    def own_bytes(self) -> int:
        """See `Backend`."""
        return sum(own.num_bytes for own in list(self._own.values()))

    @property
    def page_bytes(self) -> int:
        """See `Backend`."""
        return self._shape.page_bytes

    @property
    def num_adapters(self) -> int:
        """See `Backend`."""
        return len(self._adapters)

    @property
    def adapter_bytes(self) -> int:
        """See `Backend`."""
        return sum(adapter.num_bytes for adapter in list(self._adapters.values()))

    def load(
        self, artifact: str | None, in_use: Collection[str], digest: str | None = None
    ) -> bool:
        """See `Backend`."""
        if artifact is None:
            return True
        for kept in (self._adapters, self._own):
            if artifact in kept:
                kept.move_to_end(artifact)
                return True
        check_digest(Path(artifact), digest)
        found = read_artifact(Path(artifact))
        name = Path(artifact).parent.name
        if found.weights is None:
            assert found.adapter is not None
            if not _make_room(self._adapters, self._max_adapter_bytes, 0, in_use):
                return False
            self._adapters[artifact] = self._pack_adapter(found.adapter)
            self.num_loads += 1
            _make_room(self._adapters, self._max_adapter_bytes, 0, {*in_use, artifact})
            logger.info("adapter %s read, %d kept", name, len(self._adapters))
            return True
        # Before, so that what is kept and what is read are never both in memory.
        more = self._base.num_bytes
        if self._precision == "auto":  # which keeps float32 what bfloat16 does not hold
            more = max(more, weight_bytes(found.weights))
        if not _make_room(self._own, self._max_own_bytes, more, in_use):
            return False
        config = read_config(found.weights)
        model = _pack(found.weights, config, self._precision)
        if model.shape != self._shape:
            raise ModelError(f"{found.weights} has another shape than the base model.")
        adapter = self._pack_adapter(found.adapter) if found.adapter else None
        self._own[artifact] = OwnModel(model, adapter)
        self.num_loads += 1
        logger.info("custom model %s read, %d with weights of their own", name, len(self._own))
        return True

    def run(self, parts: Sequence[Part]) -> list[Scores | Exception | None]:
        """See `Backend`."""
        found: list[Scores | Exception | None] = [None] * len(parts)
        models: dict[str, list[int]] = {}
        for place, part in enumerate(parts):
            own = part.artifact if part.artifact in self._own else None
            models.setdefault(own or "", []).append(place)
        for own, places in models.items():
            model = self._own[own].model if own else self._base
            rows = [self._rows(parts[place]) for place in places]
            logits_NV, chosen = self._forward.run(model, rows)
            first = 0
            for place in places:
                if count := parts[place].num_scores:
                    last = first + count
                    found[place] = Scores(logits_NV[first:last], chosen[first:last])
                    first = last
        return found

    def close(self) -> None:
        """See `Backend`."""
        self._forward.close()

    def _rows(self, part: Part) -> Rows:
        adapter = None
        if part.artifact is not None:
            own = self._own.get(part.artifact)
            adapter = own.adapter if own else self._adapters[part.artifact]
        pages = pages_of(part.pages)
        return Rows(part.token_ids, part.first_position, pages, adapter, part.num_scores, part.draw)

    def _pack_adapter(self, folder: Path) -> PackedAdapter:
        adapter = load_adapter(folder)
        if adapter.config.rank > MAX_RANK:
            raise ModelError(
                f"The adapter has rank {adapter.config.rank}; up to {MAX_RANK} can be served."
            )
        return pack_adapter(adapter, self._shape, self._inner)


def _pack(
    folder: Path,
    config: Mapping[str, Any],
    precision: str,
    kept: Mapping[str, PackedMatrix] | None = None,
) -> PackedModel:
    shape = read_shape(config)
    if shape is None:
        raise ModelError(f"{folder} has another architecture than the base model.")
    return pack_model(config, shape, read_weights(folder), precision, kept)


def _pack_kept(
    folder: Path, config: Mapping[str, Any], precision: str, kept: KeptMatrices | None
) -> PackedModel:
    """Pack a model, or take what is kept of it; what is not kept yet is."""
    found = {} if kept is None else kept.read()
    matrices = {
        name: PackedMatrix(torch.frombuffer(data, dtype=torch.uint8), format)
        for name, (format, data) in found.items()
    }
    model = _pack(folder, config, precision, matrices)
    if kept is not None and not found:
        kept.write_later(
            {
                name: (matrix.format, matrix.data.numpy().data)
                for name, matrix in model.matrices.items()
            }
        )
    return model


def _make_room(
    kept: OrderedDict[str, K], max_bytes: int, more: int, in_use: Collection[str]
) -> bool:
    """Let go of what was not used for longest; False where what is in use alone is too much."""
    for name in list(kept):
        if sum(one.num_bytes for one in kept.values()) + more <= max_bytes:
            return True
        if name not in in_use:
            del kept[name]
    return not kept or sum(one.num_bytes for one in kept.values()) + more <= max_bytes
