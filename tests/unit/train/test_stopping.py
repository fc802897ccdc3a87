"""With early stopping, the best state is what is published, whatever interrupts the run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_plan import tiny_plan

from outcrop.errors import StopRequested, TrainingError
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter
from outcrop.train import stopping
from outcrop.train.checkpoint import Keeper
from outcrop.train.loop import TrainResult, train
from outcrop.train.metrics import ValidationRow
from outcrop.train.plan import EarlyStopping, TrainPlan
from outcrop.train.stopping import BEST

PLAN = tiny_plan(
    method="full",
    num_epochs=6,
    batch_size=4,
    learning_rate=2e-2,
    warmup_steps=0,
    early_stopping=EarlyStopping(0.0, patience=3),
)
"""Few records and a rate that is too large: the validation loss falls, then rises."""
TRAINING, VALIDATION = learnable_examples(12), learnable_examples(12, seed=1)


@dataclasses.dataclass
class Seen:
    result: TrainResult
    rows: list[ValidationRow]

    @property
    def best(self) -> ValidationRow:
        return min(self.rows, key=lambda row: row.validation_loss)


def run(
    folder: Path,
    output: Path,
    plan: TrainPlan = PLAN,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    earlier: Sequence[Path] = (),
    **options: Any,
) -> Seen:
    rows: list[ValidationRow] = []
    result = train(
        *(plan, folder, TRAINING, VALIDATION, output),
        on_validation=rows.append,
        on_resume=lambda steps, validations: rows.extend(validations),
        should_stop=should_stop,
        threads=1,
        dtype=torch.float32,
        checkpoints=output / "checkpoints",
        earlier=earlier,
        **options,
    )
    return Seen(result, rows)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The run without an interruption."""
    return run(folder, tmp_path_factory.mktemp("whole"))


def test_the_state_with_the_lowest_validation_loss_is_published(whole: Seen) -> None:
    best = whole.best
    assert 0 < best.step_number < whole.result.steps, "it fell, then rose"
    assert whole.result.stopped_early
    assert whole.result.published_step == best.step_number
    assert whole.result.validation_loss == best.validation_loss
    published = load_base(whole.result.artifact, torch.float32)
    assert evaluate_likelihood(published, VALIDATION).loss == pytest.approx(
        best.validation_loss, rel=1e-6
    )


def test_without_early_stopping_the_last_state_is_published(folder: Path, tmp_path: Path) -> None:
    seen = run(folder, tmp_path, dataclasses.replace(PLAN, early_stopping=None))
    assert seen.best.step_number < seen.result.steps == 18
    assert seen.result.published_step == 18
    assert seen.result.validation_loss == seen.rows[-1].validation_loss
    assert not (tmp_path / BEST).exists()


def test_a_run_that_never_improves_publishes_the_base_model(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, method="adapter", learning_rate=1e3)
    seen = run(folder, tmp_path, plan)
    assert seen.best.step_number == seen.result.published_step == 0
    adapter = load_adapter(seen.result.artifact)
    assert not any(b_OR.any() for _, b_OR in adapter.tensors.values())


def test_the_best_state_survives_a_stop_anywhere(
    folder: Path, tmp_path: Path, whole: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)
    asked = itertools.count()
    run(folder, tmp_path / "count", should_stop=lambda: next(asked) < 0)
    num_places = next(asked)
    for place in range(1, num_places, max(1, num_places // 12)):
        first, second = tmp_path / f"{place}-1", tmp_path / f"{place}-2"
        answers = itertools.chain([False] * place, [True])
        with pytest.raises(StopRequested):
            run(folder, first, should_stop=answers.__next__)
        seen = run(folder, second, earlier=[first / "checkpoints"])
        assert seen.rows == whole.rows
        assert seen.result.digest == whole.result.digest, f"stopped at place {place}"
        assert seen.result.published_step == whole.result.published_step


class Died(Exception):
    """Stands for the end of the process."""


def die_after(step: int) -> Callable[[ValidationRow], None]:
    def on_step(row: Any) -> None:
        if row.step_number == step:
            raise Died

    return on_step


def test_a_checkpoint_whose_best_state_is_damaged_is_passed_over(
    folder: Path, tmp_path: Path, whole: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)
    with pytest.raises(Died):
        run(folder, tmp_path / "1", on_step=die_after(whole.best.step_number))
    checkpoints = tmp_path / "1" / "checkpoints"
    newest = checkpoints / f"step-{whole.best.step_number}" / BEST
    content = newest.read_bytes()
    newest.unlink()  # it shares its bytes with the others
    newest.write_bytes(content[:-5])
    seen = run(folder, tmp_path / "2", earlier=[checkpoints])
    assert seen.result.digest == whole.result.digest


def test_a_best_state_that_was_damaged_meanwhile_is_not_published(
    folder: Path, tmp_path: Path, whole: Seen
) -> None:
    def damage(row: Any) -> None:
        if row.step_number == whole.best.step_number + 1:
            with (tmp_path / BEST).open("r+b") as stream:
                stream.seek(-3, 2)
                stream.write(b"xxx")

    with pytest.raises(TrainingError, match=rf"state, of step {whole.best.step_number}, was damag"):
        run(folder, tmp_path, on_step=damage)
    assert not (tmp_path / "artifact").exists()


def test_a_best_state_that_cannot_be_written_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stopping, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        run(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == []
