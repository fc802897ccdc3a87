"""A run that goes on from a custom model: every kind of parent, every kind of child."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_plan import tiny_plan
from torch import Tensor

from outcrop.errors import ModelError, StopRequested
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models.artifact import folder_digest, read_artifact
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter, set_adapter
from outcrop.train.loop import train
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import TrainPlan

PLAN = tiny_plan(lora_targets=("q_proj", "v_proj", "up_proj", "down_proj"))
FULL = dataclasses.replace(PLAN, method="full", learning_rate=2e-3)
LARGER = dataclasses.replace(
    PLAN, lora_rank=12, lora_alpha=24.0, lora_targets=(*PLAN.lora_targets, "o_proj")
)
TRAINING = learnable_examples(40)
MORE = learnable_examples(24, seed=2)
VALIDATION = learnable_examples(12, seed=1)
PLANS = {"adapter": PLAN, "full": FULL}


def run(
    plan: TrainPlan, folder: Path, output: Path, parent: Path | None = None, **options: Any
) -> tuple[Path, list[float]]:
    """Train in float32 and return the artifact and the validation losses."""
    rows: list[ValidationRow] = []
    result = train(
        plan,
        folder,
        TRAINING if parent is None else MORE,
        VALIDATION,
        output,
        parent=parent,
        on_validation=rows.append,
        threads=1,
        dtype=torch.float32,
        **options,
    )
    return result.artifact, [row.validation_loss for row in rows]


def loss_of(artifact: Path, folder: Path) -> float:
    """The validation loss of an artifact as whoever serves it reads it."""
    found = read_artifact(artifact)
    model = load_base(found.weights or folder, torch.float32)
    if found.adapter is not None:
        set_adapter(model, load_adapter(found.adapter))
    return evaluate_likelihood(model, VALIDATION).loss


@pytest.mark.parametrize("child", ["adapter", "full", "larger"])
@pytest.mark.parametrize("parent", ["adapter", "full", "both"])
def test_training_goes_on_from_the_parents_function_and_learns_more(
    folder: Path, tmp_path: Path, parent: str, child: str
) -> None:
    if parent == "both":
        whole, _ = run(FULL, folder, tmp_path / "grandparent")
        before, losses = run(PLAN, folder, tmp_path / "parent", whole)
    else:
        before, losses = run(PLANS[parent], folder, tmp_path / "parent")
    plan = {**PLANS, "larger": LARGER}[child]
    after, more = run(plan, folder, tmp_path / "child", before)
    assert more[0] == pytest.approx(losses[-1], rel=1e-6), "it begins where the parent ended"
    assert more[-1] < losses[-1]
    has_own_weights = child == "full" or parent != "adapter"
    found = read_artifact(after)
    assert (found.weights is not None, found.adapter is not None) == (
        has_own_weights,
        child != "full",
    )
    for gone in ("parent", "grandparent"):
        shutil.rmtree(tmp_path / gone, ignore_errors=True)
    assert loss_of(after, folder) == pytest.approx(more[-1], rel=1e-6), "it needs no parent"


def test_an_adapter_over_own_weights_leaves_their_bytes_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    whole, _ = run(FULL, folder, tmp_path / "one")
    child, _ = run(PLAN, folder, tmp_path / "two", whole)
    grandchild, _ = run(LARGER, folder, tmp_path / "three", child)
    weights = [path / "model.safetensors" for path in (whole, child, grandchild)]
    assert len({path.read_bytes() for path in weights}) == 1
    assert load_adapter(grandchild / "adapter").config.rank == LARGER.lora_rank


def test_an_adapter_is_merged_into_float32_masters_also_where_bfloat16_computes(
    folder: Path, tmp_path: Path
) -> None:
    from outcrop.train.methods import make_trainable

    parent, _ = run(PLAN, folder, tmp_path / "parent")
    adapter = load_adapter(parent)
    model = load_base(folder, torch.bfloat16)
    bases = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
    trainable = make_trainable(model, FULL, 0, start=adapter)
    assert trainable.flat is not None
    masters: dict[str, Tensor] = trainable.flat.master_weights()
    for name, (a_RI, b_OR) in adapter.tensors.items():
        wanted = bases[f"{name}.weight"].double() + adapter.config.scaling * (
            b_OR.double() @ a_RI.double()
        )
        torch.testing.assert_close(masters[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    live = dict(model.named_parameters())
    assert all(torch.equal(live[name], masters[name].bfloat16()) for name in masters)
    assert all(torch.equal(live[name], bases[name].bfloat16()) for name in live.keys() - masters)


def test_a_run_does_not_go_on_from_a_checkpoint_of_another_parent(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    one, _ = run(PLAN, folder, tmp_path / "one")
    two, _ = run(dataclasses.replace(PLAN, learning_rate=5e-3), folder, tmp_path / "two")
    kept = tmp_path / "checkpoints"
    options = {"checkpoints": kept, "checkpoint_seconds": 0.0}
    run(PLAN, folder, tmp_path / "first", one, **options)
    wanted, _ = run(PLAN, folder, tmp_path / "alone", two)
    found, _ = run(PLAN, folder, tmp_path / "second", two, earlier=[kept])
    assert "of another run" in caplog.text
    name = "adapter_model.safetensors"
    assert (found / name).read_bytes() == (wanted / name).read_bytes()


def test_a_parent_that_is_gone_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither an adapter nor a whole model"):
        run(PLAN, folder, tmp_path / "output", tmp_path / "nowhere")


@pytest.mark.parametrize("parent", ["adapter", "full"])
@pytest.mark.parametrize("child", ["adapter", "full"])
def test_an_interrupted_chained_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, parent: str, child: str
) -> None:
    before, _ = run(PLANS[parent], folder, tmp_path / "parent")
    wanted, losses = run(PLANS[child], folder, tmp_path / "whole", before)
    kept = tmp_path / "checkpoints"
    steps: list[StepRow] = []
    with pytest.raises(StopRequested):
        run(
            *(PLANS[child], folder, tmp_path / "first", before),
            checkpoints=kept,
            on_step=steps.append,
            should_stop=lambda: len(steps) == 2,
        )
    assert list(kept.iterdir())
    found, more = run(PLANS[child], folder, tmp_path / "second", before, earlier=[kept])
    assert folder_digest(found) == folder_digest(wanted)
    assert more == losses[-len(more) :]
