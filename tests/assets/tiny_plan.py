"""A plan for the tiny model that learns something in a moment."""

from __future__ import annotations

from typing import Any

from outcrop.train.plan import TrainPlan


def tiny_plan(**changes: Any) -> TrainPlan:
    """Return a plan of one epoch: a small adapter, batches of 8, no early stopping."""
    settings: dict[str, Any] = {
        "base_model": "Tiny",
        "method": "adapter",
        "num_epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_targets": ("q_proj", "down_proj"),
        "early_stopping": None,
        "evaluation_percentage": None,
        "hyper_parameters": {},
    }
    return TrainPlan(**(settings | changes))
