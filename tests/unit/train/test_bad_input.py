"""Data, settings, files and clocks that a run should not meet, and does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_plan import tiny_plan

from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter
from outcrop.train.checkpoint import PAGE, VERSION, Keeper
from outcrop.train.loop import TrainResult, train
from outcrop.train.metrics import StepRow
from outcrop.train.plan import TrainPlan

CONTEXT = 512
LAYERS = 2
PLAN = tiny_plan(num_epochs=2, batch_size=4)
TRAINING = learnable_examples(12)
ONE_TOKEN = Example([5], [True])
NO_COMPLETION = Example([5, 6, 7], [False] * 3)
WHOLE_CONTEXT = Example(
    [place % 90 + 3 for place in range(CONTEXT)], [place > 3 for place in range(CONTEXT)]
)


def run(
    folder: Path,
    output: Path,
    training: Sequence[Example] = TRAINING,
    plan: TrainPlan = PLAN,
    **options: Any,
) -> tuple[TrainResult, list[StepRow]]:
    rows: list[StepRow] = []
    arguments: dict[str, Any] = {"on_step": rows.append, "threads": 1, **options}
    return train(plan, folder, training, [], output, **arguments), rows


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [ONE_TOKEN, NO_COMPLETION], ids=["one token", "no completion"])
def test_a_record_without_loss_adds_nothing_to_its_batch(
    folder: Path, tmp_path: Path, odd: Example
) -> None:
    plan = dataclasses.replace(PLAN, batch_size=13, num_epochs=1)
    _, (plain,) = run(folder, tmp_path / "1", TRAINING, plan)
    _, (mixed,) = run(folder, tmp_path / "2", [*TRAINING, odd], plan)
    assert mixed.training_loss == pytest.approx(plain.training_loss, rel=1e-2)
    assert mixed.num_tokens == plain.num_tokens + len(odd.input_ids)


def test_a_batch_without_any_loss_fails_with_its_step_and_its_records(
    folder: Path, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, batch_size=1, num_epochs=1)
    with pytest.raises(EmptyLossError) as caught:
        run(folder, tmp_path, [NO_COMPLETION, TRAINING[0], ONE_TOKEN], plan)
    assert str(caught.value).startswith("Step ")
    assert "The batch held the training records" in str(caught.value)


def test_a_record_as_long_as_the_context_trains(folder: Path, tmp_path: Path) -> None:
    result, rows = run(folder, tmp_path, [WHOLE_CONTEXT, *TRAINING])
    assert all(math.isfinite(row.training_loss) for row in rows)
    assert result.num_tokens == 2 * (CONTEXT + sum(len(item.input_ids) for item in TRAINING))


def test_a_batch_larger_than_the_data_is_one_step_an_epoch(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, batch_size=1000)
    result, rows = run(folder, tmp_path, TRAINING, plan)
    assert (result.steps, len(rows)) == (2, 2)
    assert {row.num_tokens for row in rows} == {sum(len(item.input_ids) for item in TRAINING)}


# --- learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adapter", "full"])
def test_learning_rate_zero_completes_and_changes_nothing(
    folder: Path, tmp_path: Path, method: str
) -> None:
    result, rows = run(
        folder, tmp_path, plan=dataclasses.replace(PLAN, learning_rate=0.0, method=method)
    )
    assert result.steps == len(rows) == 6
    if method == "adapter":
        tensors = load_adapter(result.artifact).tensors
        assert not any(b_OR.any() for _, b_OR in tensors.values())
        return
    base, tuned = load_base(folder), load_base(result.artifact)
    for before, after in zip(base.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("method", ["adapter", "full"])
@pytest.mark.parametrize("rate", [1e3, 1e20, 1e38])
def test_an_absurd_learning_rate_fails_with_step_and_records_or_completes_honestly(
    folder: Path, tmp_path: Path, rate: float, method: str
) -> None:
    plan = dataclasses.replace(PLAN, learning_rate=rate, warmup_steps=0, method=method)
    rows: list[StepRow] = []
    refusal = ""
    try:
        run(folder, tmp_path, plan=plan, on_step=rows.append)
    except NonFiniteLossError as error:
        refusal = str(error)
    assert all(math.isfinite(row.training_loss) for row in rows)
    assert all(math.isfinite(row.gradient_norm) for row in rows)
    assert (tmp_path / "artifact").exists() == (not refusal) == (len(rows) == 6)
    if refusal:
        assert f"Step {len(rows)}: " in refusal
        assert "The batch held the training records" in refusal
        assert "smaller learningRate" in refusal


# --- stops ---------------------------------------------------------------------------------------


def test_a_stop_is_heard_between_the_layers_of_one_long_record(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in work, only a layer's work lies between two looks; the steps done are kept."""
    monkeypatch.setattr(Keeper, "is_due", lambda self: False)
    plan = dataclasses.replace(PLAN, batch_size=1, num_epochs=2)
    records = [WHOLE_CONTEXT, WHOLE_CONTEXT]
    looks = itertools.count()
    looks_at: list[int] = []

    def note(row: StepRow) -> None:
        looks_at.append(next(looks))

    whole, _ = run(
        folder, tmp_path / "whole", records, plan, on_step=note, should_stop=lambda: next(looks) < 0
    )
    a_step = looks_at[2] - looks_at[1]
    assert a_step > 2 * LAYERS, "both passes look before each layer"

    for inside in range(1, a_step, 2):
        first, second = tmp_path / f"{inside}-1", tmp_path / f"{inside}-2"
        answers = itertools.chain([False] * (looks_at[1] - 2 + inside), itertools.repeat(True))
        with pytest.raises(StopRequested):
            run(
                *(folder, first, records, plan),
                should_stop=answers.__next__,
                checkpoints=first / "checkpoints",
            )
        kept = [path.name for path in (first / "checkpoints").iterdir()]
        assert kept == ["step-2"], "the last whole step, and nothing of the unfinished one"
        result, rows = run(folder, second, records, plan, earlier=[first / "checkpoints"])
        assert [row.step_number for row in rows] == [2, 3]
        assert result.digest == whole.digest


# --- checkpoints ---------------------------------------------------------------------------------


def interrupted(folder: Path, output: Path) -> Path:
    """A run that was stopped after its third step, with a checkpoint of each."""

    def stop(row: StepRow) -> None:
        if row.step_number == 3:
            raise StopRequested

    with pytest.raises(StopRequested):
        run(folder, output, on_step=stop, checkpoints=output / "checkpoints")
    return output / "checkpoints"


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, None])
def test_a_checkpoint_of_another_version_is_not_gone_on_from(
    folder: Path, tmp_path: Path, version: int | None
) -> None:
    expected, _ = run(folder, tmp_path / "whole")
    checkpoints = interrupted(folder, tmp_path / "1")
    for place in checkpoints.iterdir():
        page = json.loads((place / PAGE).read_text())
        page["version"] = version
        (place / PAGE).write_text(json.dumps(page))
    result, rows = run(folder, tmp_path / "2", earlier=[checkpoints])
    assert rows[0].step_number == 0
    assert result.digest == expected.digest


@pytest.mark.usefixtures("always")
def test_a_half_written_checkpoint_is_as_if_it_were_not_there(folder: Path, tmp_path: Path) -> None:
    expected, _ = run(folder, tmp_path / "whole")
    checkpoints = interrupted(folder, tmp_path / "1")
    newest = max(checkpoints.iterdir(), key=lambda path: path.name)
    half = checkpoints / ".step-99.1234"
    newest.rename(half)
    (half / PAGE).unlink()
    (checkpoints / "step-98").mkdir()
    (checkpoints / "step-junk").write_text("not a folder")
    result, rows = run(folder, tmp_path / "2", earlier=[checkpoints])
    assert rows[0].step_number > 0
    assert result.digest == expected.digest


@pytest.mark.usefixtures("always")
def test_a_checkpoint_of_another_job_is_not_gone_on_from(folder: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(PLAN, learning_rate=3e-3)
    expected, _ = run(folder, tmp_path / "whole", plan=other)
    checkpoints = interrupted(folder, tmp_path / "1")
    result, rows = run(folder, tmp_path / "2", plan=other, earlier=[checkpoints])
    assert rows[0].step_number == 0
    assert result.digest == expected.digest


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_wall_clock_that_jumps_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    expected, _ = run(folder, tmp_path / "1", checkpoints=tmp_path / "1" / "checkpoints")
    now, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: now() + jump * next(calls))
    result, rows = run(folder, tmp_path / "2", checkpoints=tmp_path / "2" / "checkpoints")
    assert result.digest == expected.digest
    assert all(0 <= row.seconds < 1000 for row in rows)
    assert 0 <= result.seconds < 1000
    assert len(list((tmp_path / "2" / "checkpoints").iterdir())) == 2
