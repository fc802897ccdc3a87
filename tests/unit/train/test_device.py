"""Where a run computes, and in how large portions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_model import write_tiny_model
from tests.assets.tiny_plan import tiny_plan

from outcrop.data.pack import MAX_MICRO_BATCH_TOKENS
from outcrop.errors import TrainingError
from outcrop.models.load import compute_dtype
from outcrop.train.device import (
    GPU_TOKENS,
    LEAST_KEPT_TOKENS,
    choose_device,
    default_portions,
    device_dtype,
    device_name,
    gpu_portions,
)
from outcrop.train.loop import train
from outcrop.train.metrics import StepRow
from outcrop.train.portions import KEPT_TOKENS, Portions
from outcrop.train.prediction import ModelShape

CPU = torch.device("cpu")
PLAN = tiny_plan(
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=0,
    lora_rank=16,
    lora_alpha=32.0,
    lora_targets=("q_proj", "v_proj", "down_proj"),
)
LARGE = ModelShape.of(
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
)
"""Eight thousand million parameters."""
GIB = 1 << 30


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpu(monkeypatch)
    assert choose_device() == choose_device("auto") == choose_device("cpu") == CPU
    assert device_dtype(CPU) == compute_dtype()
    assert device_name(CPU) == "cpu"


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_gpu(monkeypatch)
    with pytest.raises(TrainingError, match=r"train_device is cuda, and torch .* sees no GPU"):
        choose_device("cuda")


def test_cpu_is_the_cpu_also_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("cpu") == CPU
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)


def test_the_cpu_keeps_its_portions() -> None:
    for longest in (1, 100, 512):
        found = default_portions(CPU, LARGE, PLAN, longest, 2)
        assert found == Portions(MAX_MICRO_BATCH_TOKENS, KEPT_TOKENS)


def test_a_gpu_with_much_memory_keeps_activations_of_large_micro_batches() -> None:
    found = gpu_portions(LARGE, PLAN, 140 * GIB)
    assert found.tokens == found.kept_tokens
    assert LEAST_KEPT_TOKENS <= found.tokens <= GPU_TOKENS


def test_less_memory_means_smaller_portions_then_activations_computed_twice() -> None:
    sizes = [gpu_portions(LARGE, PLAN, gigabytes * GIB) for gigabytes in (400, 140, 80, 48, 24)]
    assert sizes[0] == Portions(GPU_TOKENS, GPU_TOKENS)
    assert sizes[-1].kept_tokens == 0
    kept = [portions.kept_tokens for portions in sizes]
    assert kept == sorted(kept, reverse=True)
    for portions in sizes:
        assert portions.kept_tokens in (0, portions.tokens)


def test_the_smallest_gpu_gets_the_smallest_portions() -> None:
    full = dataclasses.replace(PLAN, method="full")
    assert gpu_portions(LARGE, full, GIB) == Portions(MAX_MICRO_BATCH_TOKENS, 0)


def test_a_run_takes_the_device_and_portions_that_it_is_given(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base")
    rows: list[StepRow] = []
    train(
        dataclasses.replace(PLAN, lora_rank=2, lora_alpha=4.0),
        *(folder, learnable_examples(8), [], tmp_path / "output"),
        device=CPU,
        micro_batch_tokens=16,
        on_step=rows.append,
    )
    assert {(row.micro_batch_tokens, row.kept_tokens) for row in rows} == {(16, KEPT_TOKENS)}
