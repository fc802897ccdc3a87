"""What the training core does for speed, each thing with a way to do without it, for the ladder.

Nothing of this can be switched in the product: a trick is turned off by replacing a function of the
core in the process that is measured. One that is not there any more ends the measurement, so the
ladder never shows a trick that was not turned off.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from outcrop.data.records import Example
from outcrop.models.rows import Row


def stand_in(module: str, name: str, function: Callable[..., Any]) -> None:
    """Put another function in the place of a module's own."""
    owner = importlib.import_module(module)
    if not hasattr(owner, name):
        raise SystemExit(f"{module}.{name} is gone: the ladder must be brought up to date")
    setattr(owner, name, function)


def no_kernels(threads: int) -> dict[str, Any]:
    """Torch's operations between the matrix products, in the place of compiled C."""
    kernels: Any = importlib.import_module("outcrop.models.kernels")
    kernels.keep_kernels_in(None)
    return {}


def no_own_passes(threads: int) -> dict[str, Any]:
    """Transformers' modules and autograd, as for architectures that the passes do not cover."""
    stand_in("outcrop.train.methods", "make_decoder", lambda *_, **__: None)
    return {}


def no_shared_prefix(threads: int) -> dict[str, Any]:
    """What records of a row begin with alike is computed for each of them."""
    stand_in("outcrop.data.pack", "_shared_tokens", lambda examples: 0)
    return {}


def no_lanes(threads: int) -> dict[str, Any]:
    """All threads share out every operation of one row at a time."""
    tuning: Any = importlib.import_module("outcrop.train.tuning")
    return {"thread_plan": tuning.ThreadPlan(1, threads, float(threads))}


def no_kept_activations(threads: int) -> dict[str, Any]:
    """Each layer keeps its input only, and computes its activations again for the way back."""
    return {"kept_tokens": 0}


def no_rows(threads: int) -> dict[str, Any]:
    """Every record goes through the model alone, with all threads."""
    return {"micro_batch_tokens": 1}


def all_scores(threads: int) -> dict[str, Any]:
    """All tokens of a row have scores, and so the last layer is computed for all of them. The
    losses of such a run mean nothing."""
    gradients: Any = importlib.import_module("outcrop.train.gradients")
    lay_row = gradients.lay_row

    def lay_all(hand: Sequence[Example]) -> Row:
        row: Row = lay_row(hand)
        return replace(row, sources=list(range(len(row.input_ids))), labels=list(row.input_ids))

    stand_in("outcrop.train.gradients", "lay_row", lay_all)
    return {}


def no_kept_memory(threads: int) -> dict[str, Any]:
    """Each tensor of the passes is asked of the C library and given back to it."""
    workspace: Any = importlib.import_module("outcrop.models.workspace")

    def take(_: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    if not hasattr(workspace.Stack, "take"):
        raise SystemExit("Stack.take is gone: the ladder must be brought up to date")
    workspace.Stack.take = take
    return {}


def no_fused_optimizer(threads: int) -> dict[str, Any]:
    """AdamW as a row of operations over all of the trained numbers."""
    adamw = torch.optim.AdamW

    def unfused(*arguments: Any, fused: bool, **named: Any) -> torch.optim.AdamW:
        return adamw(*arguments, **named)

    stand_in("torch.optim", "AdamW", unfused)
    return {}


WITHOUT: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "compiled kernels": no_kernels,
    "passes written by hand": no_own_passes,
    "a shared prefix computed once": no_shared_prefix,
    "lanes": no_lanes,
    "kept activations": no_kept_activations,
    "several records in a row": no_rows,
    "scores only where there is loss": all_scores,
    "memory kept from row to row": no_kept_memory,
    "a fused optimizer": no_fused_optimizer,
}
"""Name of a trick -> what does without it: takes the number of threads, returns arguments of
`train(...)`; is called in the measured process before anything else."""
