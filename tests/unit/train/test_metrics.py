"""The files of a job's output."""

from __future__ import annotations

import csv
import io
import json
import math

from outcrop.train.metrics import (
    SPEED_WINDOW,
    StepRow,
    ValidationRow,
    speed,
    step_csv,
    step_jsonl,
    validation_csv,
)


def step(number: int, loss: float, perplexity: float, seconds: float = 0.5) -> StepRow:
    return StepRow(number, 0, loss, perplexity, 100, seconds, 1e-3, 0.75, 2**30, 512, 2048)


def test_training_metrics_have_bedrocks_columns_in_order() -> None:
    rows = [step(0, 2.5, math.exp(2.5)), step(1, 1e-7, 1.0000001)]
    lines = step_csv(rows).decode().splitlines()
    assert lines[0] == "step_number,epoch_number,training_loss,perplexity"
    assert lines[1] == f"0,0,2.5,{math.exp(2.5)!r}"
    assert len(lines) == 3


def test_validation_metrics_have_bedrocks_columns_in_order() -> None:
    body = validation_csv([ValidationRow(0, 0, 3.25, 25.79), ValidationRow(7, 1, 1.5, 4.48)])
    assert body == (
        b"step_number,epoch_number,validation_loss,perplexity\n0,0,3.25,25.79\n7,1,1.5,4.48\n"
    )


def test_last_two_columns_of_the_last_row_are_loss_and_perplexity() -> None:
    body = step_csv([step(number, 1 / 3, math.inf) for number in range(3)])
    last = list(csv.reader(io.StringIO(body.decode())))[-1]
    assert [float(value) for value in last[-2:]] == [1 / 3, math.inf]


def test_run_without_rows_is_a_header_alone() -> None:
    assert step_csv([]) == b"step_number,epoch_number,training_loss,perplexity\n"


def test_details_tell_what_the_csv_has_no_column_for() -> None:
    rows = [step(0, 2.5, math.inf), step(1, 1.5, 4.48, seconds=1.5)]
    first, second = (json.loads(line) for line in step_jsonl(rows, 11).splitlines())
    assert first["perplexity"] is None, "JSON has no infinity"
    assert second == {
        "step": 1,
        "epoch": 0,
        "trainingLoss": 1.5,
        "perplexity": 4.48,
        "learningRate": 1e-3,
        "gradientNorm": 0.75,
        "tokens": 100,
        "seconds": 1.5,
        "tokensPerSecond": 100.0,
        "etaSeconds": 9.0,
        "peakMemoryBytes": 2**30,
        "microBatchTokens": 512,
        "keptTokens": 2048,
    }


def test_speed_is_that_of_the_recent_steps() -> None:
    rows = [step(number, 1.0, 2.7, seconds=100.0) for number in range(5)]
    rows += [step(number, 1.0, 2.7, seconds=1.0) for number in range(5, 5 + SPEED_WINDOW)]
    last = json.loads(step_jsonl(rows, 125).splitlines()[-1])
    assert (last["tokensPerSecond"], last["etaSeconds"]) == (100.0, 100.0)
    assert speed([step(0, 1.0, 2.7, seconds=0.0)], 5) == (None, None)
    assert speed([], 5) == (None, None)
