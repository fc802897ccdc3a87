"""The two CSV files."""

from __future__ import annotations

import csv
import io
import math

from outcrop.train.metrics import StepRow, ValidationRow, step_csv, validation_csv


def test_training_metrics_have_bedrocks_columns_in_order() -> None:
    rows = [StepRow(0, 0, 2.5, math.exp(2.5), 120, 0.5), StepRow(1, 0, 1e-7, 1.0000001, 90, 0.4)]
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
    body = step_csv([StepRow(step, 0, 1 / 3, math.inf, 1, 1.0) for step in range(3)])
    last = list(csv.reader(io.StringIO(body.decode())))[-1]
    assert [float(value) for value in last[-2:]] == [1 / 3, math.inf]


def test_run_without_rows_is_a_header_alone() -> None:
    assert step_csv([]) == b"step_number,epoch_number,training_loss,perplexity\n"
