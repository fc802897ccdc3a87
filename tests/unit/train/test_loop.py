"""The training loop on a tiny model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_model import VOCABULARY, tiny_model
from tests.assets.tiny_plan import tiny_plan

from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter, set_adapter
from outcrop.train.batches import describe_batch, shuffled
from outcrop.train.loop import ARTIFACT, folder_digest, train
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import EarlyStopping

PLAN = tiny_plan(
    num_epochs=2,
    lora_rank=8,
    lora_alpha=16.0,
    lora_targets=("q_proj", "v_proj", "up_proj", "down_proj"),
)
TRAINING = learnable_examples(60)
VALIDATION = learnable_examples(12, seed=1)


def test_run_reports_every_step_and_learns(folder: Path, tmp_path: Path) -> None:
    steps: list[StepRow] = []
    validations: list[ValidationRow] = []
    result = train(
        PLAN,
        folder,
        TRAINING,
        VALIDATION,
        tmp_path,
        on_step=steps.append,
        on_validation=validations.append,
        threads=1,
    )
    assert [row.step_number for row in steps] == list(range(PLAN.total_steps(60)))
    assert [row.epoch_number for row in steps] == [0] * 8 + [1] * 8
    assert all(row.perplexity == pytest.approx(math.exp(row.training_loss)) for row in steps)
    assert sum(row.num_tokens for row in steps) == result.num_tokens
    assert result.num_tokens == 2 * sum(len(example.input_ids) for example in TRAINING)
    assert result.steps == 16
    assert not result.stopped_early
    assert result.validation_loss == validations[-1].validation_loss
    assert validations[-1].validation_loss < 0.7 * validations[0].validation_loss
    assert result.training_loss < steps[0].training_loss


def test_validation_begins_with_the_base_and_follows_every_epoch(
    folder: Path, tmp_path: Path
) -> None:
    rows: list[ValidationRow] = []
    train(PLAN, folder, TRAINING, VALIDATION, tmp_path, on_validation=rows.append, threads=1)
    assert (rows[0].step_number, rows[0].epoch_number) == (0, 0)
    base = evaluate_likelihood(load_base(folder), VALIDATION)
    assert rows[0].validation_loss == pytest.approx(base.loss, rel=1e-3)
    assert {8, 16} <= {row.step_number for row in rows}
    assert rows[-1].epoch_number == 1


def test_artifact_answers_as_the_trained_model_did(folder: Path, tmp_path: Path) -> None:
    result = train(PLAN, folder, TRAINING, VALIDATION, tmp_path, threads=1)
    model = load_base(folder)
    set_adapter(model, load_adapter(result.artifact))
    assert evaluate_likelihood(model, VALIDATION).loss == result.validation_loss
    assert result.digest == folder_digest(result.artifact)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bytes(folder: Path, tmp_path: Path, threads: int) -> None:
    plan = dataclasses.replace(PLAN, num_epochs=1)
    runs = []
    for name in ("one", "two"):
        rows: list[StepRow] = []
        result = train(
            plan, folder, TRAINING[:24], [], tmp_path / name, on_step=rows.append, threads=threads
        )
        runs.append((result.digest, [row.training_loss for row in rows]))
    assert runs[0] == runs[1]


def test_another_seed_gives_another_order_and_artifact(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, num_epochs=1)
    first = train(plan, folder, TRAINING, [], tmp_path / "one", seed=0, threads=1)
    second = train(plan, folder, TRAINING, [], tmp_path / "two", seed=1, threads=1)
    assert first.digest != second.digest


def test_every_epoch_takes_every_record_once_in_another_order() -> None:
    first, second = shuffled(50, 0, 0), shuffled(50, 0, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert shuffled(50, 0, 0) == first


def test_base_weights_are_not_changed(folder: Path, tmp_path: Path) -> None:
    before = folder_digest(folder)
    train(dataclasses.replace(PLAN, num_epochs=1), folder, TRAINING, [], tmp_path, threads=1)
    assert folder_digest(folder) == before


def test_full_fine_tuning_moves_all_weights_and_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, method="full", learning_rate=2e-3)
    validations: list[ValidationRow] = []
    result = train(
        plan, folder, TRAINING, VALIDATION, tmp_path, on_validation=validations.append, threads=1
    )
    assert result.validation_loss is not None
    assert result.validation_loss < 0.8 * validations[0].validation_loss
    tuned = load_base(result.artifact)
    assert evaluate_likelihood(tuned, VALIDATION).loss == result.validation_loss
    base = load_base(folder)
    moved = [
        not torch.equal(now, before)
        for now, before in zip(tuned.parameters(), base.parameters(), strict=True)
    ]
    assert all(moved)


def test_stop_is_heard_between_micro_batches_and_leaves_nothing(
    folder: Path, tmp_path: Path
) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    rows: list[StepRow] = []
    with pytest.raises(StopRequested):
        train(
            PLAN,
            folder,
            TRAINING,
            [],
            tmp_path,
            on_step=rows.append,
            should_stop=should_stop,
            threads=1,
            micro_batch_tokens=20,
        )
    assert asked == 6
    assert len(rows) < 3  # a step of 8 records has several micro-batches of 20 tokens
    assert not (tmp_path / ARTIFACT).exists()


def test_callback_that_raises_ends_the_run(folder: Path, tmp_path: Path) -> None:
    def refuse(row: StepRow) -> None:
        raise StopRequested

    with pytest.raises(StopRequested):
        train(PLAN, folder, TRAINING, [], tmp_path, on_step=refuse, threads=1)
    assert not (tmp_path / ARTIFACT).exists()


def test_records_without_labels_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    silent = [Example([4, 5, 6], [False] * 3)]
    with pytest.raises(EmptyLossError, match="training data"):
        train(PLAN, folder, silent, [], tmp_path, threads=1)


def test_loss_that_is_not_finite_is_refused_with_its_step(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteLossError, match="Step 0: the training loss became nan") as caught:
        train(PLAN, tmp_path / "broken", TRAINING, [], tmp_path / "output", threads=1)
    records = sorted(place + 1 for place in shuffled(len(TRAINING), 0, 0)[: PLAN.batch_size])
    assert f"held the training records {', '.join(map(str, records))}, " in str(caught.value)


def test_a_large_batch_is_named_by_its_first_records() -> None:
    assert describe_batch(range(18)).startswith(
        "The batch held the training records 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 "
        "and 2 more, counted"
    )


def test_validation_loss_that_is_not_finite_is_refused_with_its_step(tmp_path: Path) -> None:
    """One word that only a validation record uses is broken: training itself goes well."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = math.nan
    model.save_pretrained(tmp_path / "broken")
    validation = [*VALIDATION, Example([VOCABULARY - 1, 4, 5], [False, True, True])]
    rows: list[ValidationRow] = []
    with pytest.raises(
        NonFiniteLossError, match=r"Step 0: the validation loss became nan\. Nothing was published"
    ):
        train(
            PLAN,
            tmp_path / "broken",
            TRAINING,
            validation,
            tmp_path / "output",
            on_validation=rows.append,
            threads=1,
        )
    assert rows == []
    assert not (tmp_path / "output").exists()


def test_early_stopping_ends_a_run_that_no_longer_improves(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(
        PLAN, learning_rate=0.0, num_epochs=5, early_stopping=EarlyStopping(0.01, patience=3)
    )
    rows: list[ValidationRow] = []
    result = train(
        plan, folder, TRAINING, VALIDATION, tmp_path, on_validation=rows.append, threads=1
    )
    assert result.stopped_early
    assert len(rows) == 1 + 3  # the base, then the patience
    assert result.steps == rows[-1].step_number < plan.total_steps(60)
    assert result.artifact.is_dir()


def test_early_stopping_leaves_a_run_that_improves(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, early_stopping=EarlyStopping(0.0, patience=2))
    result = train(plan, folder, TRAINING, VALIDATION, tmp_path, threads=1)
    assert not result.stopped_early
