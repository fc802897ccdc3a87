"""What the contenders of `training_gpu.py` have in common: random models, records, and a clock.

It imports nothing of Outcrop, because TRL may live in an environment of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""Those of Llama 3.2 1B and Llama 3.1 8B, and one that only proves that the programs run."""
FIRST_IDS = 3
"""Ids below are kept for padding, beginning and end."""
LOSS_SHARE = 0.4
"""Of a record's tokens, at its end: the answer."""


@dataclass(frozen=True)
class Lengths:
    """How long records are: log-normal, as those of real sets for fine-tuning are nearly."""

    median: int
    sigma: float
    least: int
    most: int


REAL_LIKE = Lengths(median=220, sigma=0.7, least=30, most=2048)
SHORT = Lengths(median=20, sigma=0.5, least=6, most=60)


def make_records(count: int, vocabulary: int, lengths: Lengths, seed: int = 0) -> list[list[Any]]:
    """Return [ids, mask] of so many records; the mask has a 1 where a token carries loss."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        length = round(lengths.median * draw.lognormvariate(0.0, lengths.sigma))
        length = max(lengths.least, min(lengths.most, length))
        ids = [draw.randrange(FIRST_IDS, vocabulary) for _ in range(length)]
        answer = max(1, round(LOSS_SHARE * length))
        records.append([ids, [0] * (length - answer) + [1] * answer])
    return records


def make_model(shape: str, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """Return a Llama with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = attention
    torch.manual_seed(0)
    maker: Any = AutoModelForCausalLM
    with device:
        return maker.from_config(config, dtype=dtype)


class Clock:
    """Notes how long steps take, until the device has done them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self._mark = self._now()

    def tick(self) -> None:
        """End a step."""
        now = self._now()
        self.seconds.append(now - self._mark)
        self._mark = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Return the most memory of the device that tensors took; 0 on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 30) -> float:
    """Return operations a second of products of square random matrices: the median."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    for _ in range(3 + repeats):
        left @ right
        clock.tick()
    return 2.0 * size**3 / sorted(clock.seconds[3:])[repeats // 2]


def step_operations(
    shape: Mapping[str, Any], method: str, rank: int, tokens: int, loss_tokens: int
) -> float:
    """Return the useful operations of a step: a multiplication and an addition count as two.

    Linear layers and head; frozen weights are used twice (forward, and backward to the inputs),
    trained ones three times. Attention and what is computed a second time are left out.
    """
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = hidden // shape["num_attention_heads"]
    keys = shape["num_key_value_heads"] * width
    pairs = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    pairs += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = sum(inputs * outputs for inputs, outputs in pairs)
    adapter = rank * sum(inputs + outputs for inputs, outputs in pairs)
    uses = 3 if method == "full" else 2
    a_token = 2.0 * uses * weights + (0.0 if method == "full" else 6.0 * adapter)
    head = 2.0 * uses * hidden * shape["vocab_size"]
    return float(a_token * shape["num_hidden_layers"] * tokens + head * loss_tokens)


def batches(records: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut records into batches, in their order."""
    return [records[first : first + size] for first in range(0, len(records), size)]
