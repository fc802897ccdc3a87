"""The benchmark for a GPU runs, tried on the CPU with a tiny model; what it counts is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_work import REAL_LIKE, SHAPES, make_model, make_records, step_operations

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_smoke_mode_prints_a_table_without_a_gpu() -> None:
    done = subprocess.run(
        # Of this Python's packages; TRL is measured or named as missing.
        [sys.executable, "-m", "benchmarks.training_gpu", "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| tiny |")]
    assert [line.split("|")[2].strip().split(" ")[0] for line in lines] == ["Outcrop", "TRL"]


def test_records_are_drawn_alike_and_within_their_bounds() -> None:
    records = make_records(500, 1000, REAL_LIKE)
    assert records == make_records(500, 1000, REAL_LIKE)
    lengths = sorted(len(ids) for ids, _ in records)
    assert lengths[0] >= REAL_LIKE.least
    assert lengths[-1] <= REAL_LIKE.most
    assert lengths[250] == pytest.approx(REAL_LIKE.median, rel=0.15)
    assert all(mask[-1] == 1 and mask[0] == 0 for _, mask in records)


@pytest.mark.parametrize(("method", "uses"), [("adapter", 2), ("full", 3)])
def test_operations_are_those_of_the_models_matrices(method: str, uses: int) -> None:
    model = make_model("tiny", torch.device("cpu"), torch.float32, "sdpa")
    matrices = {
        name: parameter.numel() for name, parameter in model.named_parameters() if "proj" in name
    }
    head = model.lm_head.weight.numel()
    rank = 0
    expected = 2 * uses * (10 * sum(matrices.values()) + 3 * head)
    assert step_operations(SHAPES["tiny"], method, rank, 10, 3) == expected
