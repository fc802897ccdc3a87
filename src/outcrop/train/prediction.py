"""How much memory a training process takes at most, foretold from a model's shape.

Torch-free: the queue asks before a job begins. The terms are what the code holds, counted; one
factor is fitted. benchmarks/training_memory.py measures how near they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.catalog import LoraConfig
from outcrop.models.files import read_json
from outcrop.train.threads import num_primitives

MEMORY_TOLERANCE = 0.15
"""`predict_memory` is this near to what is measured; benchmarks/training_memory.py measures it."""
PROCESS_BYTES = 344 << 20
"""Python, torch and transformers before anything is loaded. Measured: 344 MiB."""
WIDE_BYTES = 4
"""Of a master, a moment, and the residual stream between layers: float32."""
HEAD_TOKENS, KEPT_KEYS = 512, 512
"""As in models/passes.py and models/attention.py: tokens whose scores exist at once in a row; keys
up to which attention keeps its weights. A test compares them."""
PRIMITIVE_BYTES = 500 << 10
"""What it keeps for one of them, resident: a description of 246 KiB and code in room of 256 KiB.
Measured with oneDNN 3.12."""


@cache
def computing_bytes() -> int:
    """Return the size of a number that this machine computes with: 2 (bfloat16) or 4 (float32).

    As `models.load.compute_dtype` decides, but without torch, from what Linux tells of the
    processor. Where it does not tell, 4 is taken, so that too much is foretold and not too little.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return 4
    flags: set[str] = set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    return 2 if flags & {"avx512_bf16", "amx_tile", "bf16"} else 4


_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
}
"""What GPT-2 calls the numbers of its shape."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that memory depends on."""

    vocabulary: int
    width: int
    """Of what layers hand on to each other."""
    inner_width: int
    """Inside a layer's feed-forward part."""
    layers: int
    heads: int
    query_width: int
    """Of all heads together."""
    key_width: int
    """Of all heads of keys together; values have the same."""
    is_tied: bool
    """Whether one matrix is both the first and the last."""

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """Read it from the config.json of a folder of weights.

        Raises:
            ModelError: the file is missing or damaged, or lacks a number.
        """
        return cls.of(read_json(folder / "config.json"), str(folder))

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "the model") -> ModelShape:
        """Read it from a configuration as transformers writes it.

        Raises:
            ModelError: a number is missing.
        """
        config = {_OTHER_NAMES.get(name, name): value for name, value in config.items()}
        try:
            width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head_width = int(config.get("head_dim") or width // heads)
            return cls(
                vocabulary=int(config["vocab_size"]),
                width=width,
                # GPT-2 may leave it out; it is four times the width then.
                inner_width=int(config.get("intermediate_size") or 4 * width),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                query_width=heads * head_width,
                key_width=int(config.get("num_key_value_heads") or heads) * head_width,
                is_tied=bool(config.get("tie_word_embeddings", True)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(
                f"The config.json of {where} does not tell the model's shape: {error!r}"
            ) from error

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return inputs and outputs of each linear matrix of a layer."""
        width, inner = self.width, self.inner_width
        return {
            "q_proj": (width, self.query_width),
            "k_proj": (width, self.key_width),
            "v_proj": (width, self.key_width),
            "o_proj": (self.query_width, width),
            "gate_proj": (width, inner),
            "up_proj": (width, inner),
            "down_proj": (inner, width),
        }

    @property
    def matrix_parameters(self) -> int:
        """Those of the layers' linear matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears().values())

    @property
    def parameters(self) -> int:
        """All of them, but for norms and biases."""
        tables = (1 if self.is_tied else 2) * self.vocabulary * self.width
        return self.matrix_parameters + tables

    def adapter_parameters(self, adapter: LoraConfig) -> int:
        """Those of an adapter."""
        linears = self.linears()
        # Names of other families' layers are taken for the largest of these.
        sums = [sum(linears.get(name, (self.width, self.inner_width))) for name in adapter.targets]
        return self.layers * adapter.rank * sum(sums)


SHIPPED_SHAPE = ModelShape(
    vocabulary=49152,
    width=576,
    inner_width=1536,
    layers=30,
    heads=9,
    query_width=576,
    key_width=192,
    is_tied=True,
)
"""The shipped model's, for the time before its weights are converted; a test compares it with them.
"""


def predict_memory(
    shape: ModelShape,
    method: str,
    tokens: int,
    loss_tokens: int,
    *,
    adapter: LoraConfig = LoraConfig(),  # noqa: B008 - frozen
    number_bytes: int | None = None,
    is_recomputed: bool = False,
    record_tokens: int | None = None,
    lanes: int = 2,
) -> int:
    """Return how many bytes a training process has resident at most, within MEMORY_TOLERANCE.

    For models that models/decoder.py covers. Others take more activations, and are bounded and cut
    all the same.

    Args:
        shape: the model's.
        method: "adapter" or "full".
        tokens: of the largest micro-batch.
        loss_tokens: how many of them carry loss, at most.
        adapter: what an adapter run trains.
        number_bytes: of a frozen weight and of an activation; None takes this machine's.
        is_recomputed: whether the micro-batch computes its activations twice.
        record_tokens: of its longest record; None means that it has one only.
        lanes: rows that are computed at the same time where records are short enough.
    """
    size = number_bytes or computing_bytes()
    record = max(1, min(record_tokens or tokens, tokens))
    rows = 1 if record > tokens // lanes else lanes
    rank = adapter.rank if method == "adapter" else 0
    held = _trained_bytes(shape, method, adapter, size, rows)
    a_layer = tokens * _kept_bytes(shape, size, rank)
    a_layer += tokens // record * _attention_bytes(shape, size, record)
    # The residual stream before each layer (in `a_layer`, too), and its gradient.
    kept = 2 * tokens * shape.width * WIDE_BYTES
    if is_recomputed:
        kept += shape.layers * tokens * shape.width * WIDE_BYTES
        kept += a_layer + tokens * _forward_bytes(shape, size)
    else:
        kept += shape.layers * a_layer
    a_row = max(1, tokens // rows)
    way_back = tokens * _backward_bytes(shape, size)
    # Weights of attention that are not kept, and the gradient of one block's.
    seen = record if record > KEPT_KEYS else 0
    way_back += rows * shape.heads * KEPT_KEYS // 2 * (seen + min(record, a_row)) * size
    scores = min(loss_tokens, rows * HEAD_TOKENS) * shape.vocabulary * size
    # The matrix of the head, once more as the processor wants it.
    scores += rows * shape.vocabulary * shape.width * size
    if method == "full" and loss_tokens:
        scores += rows * shape.vocabulary * shape.width * size
    primitives = num_primitives(lanes) * PRIMITIVE_BYTES if size < WIDE_BYTES else 0
    return PROCESS_BYTES + primitives + held + kept + max(way_back, scores)


def _trained_bytes(
    shape: ModelShape, method: str, adapter: LoraConfig, size: int, rows: int
) -> int:
    """Return what a run holds whatever it computes: weights, masters, moments, gradients."""
    if method == "adapter":
        trained = shape.adapter_parameters(adapter)
        # What layers read together is laid together; the file that it came from stays mapped,
        # because the embeddings are used from there.
        weights = size * (shape.parameters + shape.matrix_parameters)
        return weights + trained * (4 * WIDE_BYTES + size + rows * size)
    # Masters, both moments and gradients; what is computed with, and a copy of it while it is
    # published; room for the gradients of rows, those of the embeddings in wide numbers.
    tables = shape.parameters - shape.matrix_parameters
    room = size * shape.matrix_parameters + WIDE_BYTES * tables
    return shape.parameters * (4 * WIDE_BYTES + 2 * size) + rows * room


def _kept_bytes(shape: ModelShape, size: int, rank: int) -> int:
    """Return what a layer keeps of a token for its backward pass, without attention's weights."""
    numbers = 2 * shape.width + 2 * shape.query_width + 2 * shape.key_width + 2 * shape.inner_width
    return 2 * WIDE_BYTES * shape.width + size * (numbers + 7 * rank)


def _forward_bytes(shape: ModelShape, size: int) -> int:
    """Return what a layer's forward pass makes of a token besides what is kept."""
    numbers = 2 * shape.width + 2 * shape.query_width + 2 * shape.key_width + shape.inner_width
    return size * numbers


def _backward_bytes(shape: ModelShape, size: int) -> int:
    """Return what a layer's backward pass makes of a token, without attention's weights."""
    numbers = 4 * shape.inner_width + 4 * shape.width
    return size * (numbers + 4 * shape.query_width + 4 * shape.key_width)


def _attention_bytes(shape: ModelShape, size: int, record: int) -> int:
    """Return what a layer keeps of attention's weights for one record: of its first keys only."""
    seen, block = min(record, KEPT_KEYS), KEPT_KEYS // 2
    rows = min(seen, block)
    weights = rows * rows + max(0, seen - block) * seen
    return shape.heads * weights * size
