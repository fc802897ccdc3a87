"""A run that was interrupted goes on as if it had not been, to the last byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_plan import tiny_plan

from outcrop.data.records import Example
from outcrop.errors import StopRequested, TrainingError
from outcrop.train import checkpoint
from outcrop.train.checkpoint import (
    KEPT,
    PAGE,
    TENSORS,
    Identity,
    Keeper,
    RunState,
    newest_checkpoint,
    save_checkpoint,
)
from outcrop.train.loop import train
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import EarlyStopping, TrainPlan
from outcrop.train.portions import Portions

PLAN = tiny_plan(
    num_epochs=2, early_stopping=EarlyStopping(0.0, 50), hyper_parameters={"epochCount": "2"}
)
TRAINING, VALIDATION = learnable_examples(36), learnable_examples(8, seed=1)
IDENTITY = Identity("data", "run")


class Died(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)


@dataclasses.dataclass
class Seen:
    """What a run reported and left behind."""

    digest: str
    steps: list[tuple[float, ...]]
    validations: list[ValidationRow]


def run(
    folder: Path,
    output: Path,
    plan: TrainPlan = PLAN,
    *,
    training: Sequence[Example] = TRAINING,
    die_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    earlier: Sequence[Path] = (),
) -> Seen:
    """Train, with checkpoints below `output`; `die_after` ends it as a kill would."""
    steps: list[tuple[float, ...]] = []
    validations: list[ValidationRow] = []

    def on_step(row: StepRow) -> None:
        steps.append((row.step_number, row.epoch_number, row.training_loss, row.num_tokens))
        if row.step_number == die_after:
            raise Died

    def on_resume(rows: Sequence[StepRow], evaluated: Sequence[ValidationRow]) -> None:
        assert not steps, "told once, before anything else"
        for row in rows:
            steps.append((row.step_number, row.epoch_number, row.training_loss, row.num_tokens))
        validations.extend(evaluated)

    result = train(
        plan,
        folder,
        training,
        VALIDATION,
        output,
        on_step=on_step,
        on_validation=validations.append,
        on_resume=on_resume,
        should_stop=should_stop,
        threads=1,
        micro_batch_tokens=24,
        checkpoints=output / "checkpoints",
        earlier=earlier,
    )
    return Seen(result.digest, steps, validations)


@pytest.fixture(scope="module", params=["adapter", "full"])
def whole(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainPlan, Seen]:
    """A plan, and its run without an interruption."""
    plan = dataclasses.replace(PLAN, method=request.param)
    return plan, run(folder, tmp_path_factory.mktemp("whole"), plan)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("died_at", [0, 4, 5, 9])
def test_a_run_that_died_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, whole: tuple[TrainPlan, Seen], died_at: int
) -> None:
    plan, expected = whole
    with pytest.raises(Died):
        run(folder, tmp_path / "1", plan, die_after=died_at)
    assert run(folder, tmp_path / "2", plan, earlier=[tmp_path / "1" / "checkpoints"]) == expected


def test_a_run_that_was_stopped_anywhere_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, whole: tuple[TrainPlan, Seen]
) -> None:
    """Stops are heard between micro-batches of steps and of evaluations; each place is tried."""
    plan, expected = whole
    asked = itertools.count()
    run(folder, tmp_path / "count", plan, should_stop=lambda: next(asked) < 0)
    num_places = next(asked)
    assert num_places > 30
    for place in range(0, num_places, 4):
        attempts = [tmp_path / f"{place}-{number}" for number in (1, 2)]
        answers = itertools.chain([False] * place, [True])
        with pytest.raises(StopRequested):
            run(folder, attempts[0], plan, should_stop=answers.__next__)
        found = run(folder, attempts[1], plan, earlier=[attempts[0] / "checkpoints"])
        assert found == expected, f"stopped at place {place}"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("file", [TENSORS, PAGE])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    folder: Path, tmp_path: Path, whole: tuple[TrainPlan, Seen], file: str
) -> None:
    plan, expected = whole
    with pytest.raises(Died):
        run(folder, tmp_path / "1", plan, die_after=6)
    kept = tmp_path / "1" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step-5", "step-6"]
    damaged = kept / "step-6" / file
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert run(folder, tmp_path / "2", plan, earlier=[kept]) == expected


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "change", [{"learning_rate": 2e-2}, {"batch_size": 9}, {"lora_rank": 2}, {"num_epochs": 3}]
)
def test_a_checkpoint_of_another_plan_is_not_gone_on_from(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    plan = dataclasses.replace(PLAN, **change)
    with pytest.raises(Died):
        run(folder, tmp_path / "1", die_after=5)
    fresh = run(folder, tmp_path / "fresh", plan)
    assert run(folder, tmp_path / "2", plan, earlier=[tmp_path / "1" / "checkpoints"]) == fresh


@pytest.mark.usefixtures("always")
def test_data_that_changed_meanwhile_fails_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(folder, tmp_path / "1", die_after=5)
    other = [*TRAINING[:-1], *learnable_examples(1, seed=9)]
    with pytest.raises(TrainingError, match="data changed after step 5"):
        run(folder, tmp_path / "2", training=other, earlier=[tmp_path / "1" / "checkpoints"])


@pytest.mark.usefixtures("always")
def test_old_checkpoints_go_when_newer_ones_are_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(folder, tmp_path / "1", die_after=7)
    earlier = tmp_path / "1" / "checkpoints"
    assert len(list(earlier.iterdir())) == KEPT
    run(folder, tmp_path / "2", earlier=[earlier])
    assert not earlier.exists()
    assert len(list((tmp_path / "2" / "checkpoints").iterdir())) == KEPT


@pytest.mark.usefixtures("always")
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    expected = run(folder, tmp_path / "1")
    monkeypatch.setattr(checkpoint, "sync", full)
    assert run(folder, tmp_path / "2") == expected
    assert list((tmp_path / "2" / "checkpoints").iterdir()) == [], "nothing half-written stays"
    assert "No space left" in caplog.text


def test_checkpoints_take_a_hundredth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slow(*_: object) -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    keeper = Keeper(tmp_path, IDENTITY, least_seconds=30.0, clock=lambda: now)
    assert not keeper.is_due()
    now = 30.0
    assert keeper.is_due()
    keeper.save(RunState(steps=3), {})
    assert keeper.saved_step == 3
    saved_at = now
    now = saved_at + 199.0
    assert not keeper.is_due()
    now = saved_at + 200.0
    assert keeper.is_due()


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    state = RunState(
        steps=7,
        num_tokens=300,
        is_evaluated=True,
        epoch_loss=0.1 + 0.2,
        epoch_labels=31,
        best_loss=1e-300,
        stale=2,
        lowest_loss=1e-301,
        portions=Portions(512, 0),
        cuts=1,
        step_rows=[StepRow(0, 0, 1 / 3, float("inf"), 12, 0.25, 1e-3, 0.1, 1 << 30, 512, 0)],
        validation_rows=[ValidationRow(0, 0, 2.5, 12.182493960703473)],
    )
    tensors = {"0.value": torch.randn(3, 5).t(), "0.exp_avg": torch.tensor([1e-45, -0.0])}
    place = save_checkpoint(tmp_path, IDENTITY, state, tensors)
    found = newest_checkpoint([tmp_path / "nowhere", tmp_path], IDENTITY)
    assert found is not None
    assert (found.state, found.has_same_data) == (state, True)
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in tensors)
    assert found.tensors.keys() == tensors.keys()
    other = newest_checkpoint([tmp_path], Identity("other data", "run"))
    assert other is not None
    assert not other.has_same_data
    assert newest_checkpoint([tmp_path], Identity("data", "other run")) is None
    page = json.loads((place / PAGE).read_text())
    page["state"]["unheard_of"] = 1
    (place / PAGE).write_text(json.dumps(page))
    assert newest_checkpoint([tmp_path], IDENTITY) is None
