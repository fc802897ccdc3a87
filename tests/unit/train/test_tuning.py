"""How cores are used: measured once, kept, and the same in every try of a job."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_model import frozen_tiny_model, write_tiny_model
from tests.numerics.test_training import PLAN

from outcrop.train import tuning
from outcrop.train.loop import train
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.tuning import ThreadPlan, assumed_threads, choose_threads


@pytest.fixture
def trainable() -> Trainable:
    return make_trainable(frozen_tiny_model(), PLAN, seed=0)


def load(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (value, value, value))


def test_a_measured_plan_is_kept_and_taken_again(
    trainable: Trainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, 0.0)
    threads = torch.get_num_threads()
    plan = choose_threads(trainable, 2, tmp_path / "plans")
    assert plan.lanes == 2
    assert plan.row_threads == (2 if plan.speedup > 1 else 1)
    assert plan.largest_share == 1 / plan.speedup
    assert torch.get_num_threads() == threads
    assert all(master.grad is None for master in trainable.masters)
    (file,) = (tmp_path / "plans").iterdir()

    monkeypatch.setattr(tuning, "_measure", lambda *arguments: pytest.fail("measured again"))
    assert choose_threads(trainable, 2, tmp_path / "plans") == plan
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_plan_of_another_machine_model_or_number_of_cores_is_not_taken(
    trainable: Trainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, 0.0)
    choose_threads(trainable, 2, tmp_path)
    choose_threads(trainable, 3, tmp_path)
    choose_threads(make_trainable(frozen_tiny_model(vocab_size=128), PLAN, 0), 2, tmp_path)
    full = dataclasses.replace(PLAN, method="full")
    choose_threads(make_trainable(frozen_tiny_model(), full, 0), 2, tmp_path)
    monkeypatch.setattr(tuning, "processor", lambda: "another one")
    choose_threads(trainable, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_beside_other_work_nothing_is_measured_and_one_thread_computes_a_row(
    trainable: Trainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, 2.6)
    monkeypatch.setattr(tuning, "_measure", lambda *arguments: pytest.fail("measured"))
    assert choose_threads(trainable, 2, tmp_path) == ThreadPlan(2, 1, 1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_plan_is_measured_again(
    trainable: Trainable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, 0.0)
    choose_threads(trainable, 2, tmp_path)
    (file,) = tmp_path.iterdir()
    for damage in (b"", b"{", b'{"lanes": 2}', b"[1]"):
        file.write_bytes(damage)
        assert choose_threads(trainable, 2, tmp_path).lanes == 2
        assert file.read_bytes() != damage


def test_a_run_reports_its_plan_and_takes_a_recorded_one(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    seen: list[ThreadPlan] = []
    recorded = ThreadPlan(lanes=3, row_threads=1, speedup=1.0)
    for name, plan in (("recorded", recorded), ("assumed", None)):
        train(
            *(PLAN, folder, learnable_examples(8), [], tmp_path / name),
            threads=2,
            thread_plan=plan,
            on_thread_plan=seen.append,
        )
    assert seen == [recorded, assumed_threads(2, has_lanes=True)]
