"""Which learning rate do adapters need, and what full fine-tuning rate does that stand for?

    python -m benchmarks.learning_rate_study run --weights FOLDER --data FOLDER --work FOLDER
    python -m benchmarks.learning_rate_study report --work FOLDER

`run` trains one model for each data set and rate on the same records in the same order, scores it
on the validation records only, and appends one line of JSON to WORK/runs.jsonl; a run that is
there already is not repeated. `report` prints the tables and draws the curves.

A set whose name begins with `cpt-` is raw text for continued pre-training. It has no validation
file: documents that were not drawn for training are.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.greedy import greedy_answers

from outcrop.data.documents import render_document
from outcrop.data.records import Document, Example, Message
from outcrop.data.render import Renderer
from outcrop.evaluate.generation import exact_match, rouge_l, words
from outcrop.models.load import load_base
from outcrop.models.lora import ALL_LINEARS, load_adapter, set_adapter
from outcrop.train.loop import train
from outcrop.train.metrics import ValidationRow
from outcrop.train.plan import TrainPlan

SETS = ("mts-dialog", "banking77", "gsm8k")
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
WARMUP_STEPS = 5
SEED = 0
ANSWER_TOKENS = 128
DOCUMENT_TOKENS = 4096
"""Titan Text's limit at batch 1."""


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--weights", type=Path, required=True)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--work", type=Path, required=True)
    run.add_argument("--sets", nargs="+", default=SETS)
    run.add_argument("--rates", nargs="+", type=float, default=RATES)
    run.add_argument("--method", choices=("adapter", "full"), default="adapter")
    run.add_argument("--rank", type=int, default=16)
    run.add_argument("--alpha", type=float, default=32.0)
    run.add_argument("--batch-size", type=int, default=8)
    run.add_argument("--epochs", type=int, default=1)
    run.add_argument("--records", type=int, default=400)
    run.add_argument("--validation-records", type=int, default=100)
    run.add_argument("--answers", type=int, default=0, help="validation records to answer")
    run.add_argument("--seed", type=int, default=SEED)
    run.add_argument("--threads", type=int, default=1)
    report = commands.add_parser("report")
    report.add_argument("--work", type=Path, required=True)
    report.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run_all(arguments)
    else:
        print_report(arguments.work, arguments.svg)


def run_all(arguments: argparse.Namespace) -> None:
    """Train and score every set at every rate."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    for rate in arguments.rates:
        for name in arguments.sets:
            key = {
                "set": name,
                "method": arguments.method,
                "rate": rate,
                "rank": arguments.rank,
                "alpha": arguments.alpha,
                "batch_size": arguments.batch_size,
                "epochs": arguments.epochs,
                "records": arguments.records,
                "seed": arguments.seed,
                "answers": arguments.answers,
            }
            if any(key.items() <= run.items() for run in read_runs(arguments.work)):
                continue
            result = run_one(arguments, name, rate)
            with (arguments.work / "runs.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(key | result) + "\n")
            print(json.dumps(key | result), flush=True)


def run_one(arguments: argparse.Namespace, name: str, rate: float) -> dict[str, Any]:
    """Train one model and return its scores on the validation records."""
    renderer = Renderer(arguments.weights)
    num_training, num_validation = arguments.records, arguments.validation_records
    if name.startswith("cpt-"):
        rows = read_rows(arguments.data / f"{name}.jsonl", num_training + num_validation)
        training, validation = rows[:num_training], rows[num_training:]
    else:
        training = read_rows(arguments.data / f"{name}-train.jsonl", num_training)
        validation = read_rows(arguments.data / f"{name}-validation.jsonl", num_validation)
    plan = TrainPlan(
        base_model=arguments.weights.name,
        method=arguments.method,
        num_epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=rate,
        warmup_steps=WARMUP_STEPS,
        lora_rank=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_targets=ALL_LINEARS,
        early_stopping=None,
        evaluation_percentage=None,
        hyper_parameters={},
    )
    losses: list[ValidationRow] = []
    started, started_cpu = time.perf_counter(), time.process_time()
    output = arguments.work / f"{name}-{arguments.method}-{rate:g}-{arguments.batch_size}"
    shutil.rmtree(output, ignore_errors=True)
    result = train(
        plan,
        arguments.weights,
        [example for row in training for example in examples(renderer, row)],
        [example for row in validation for example in examples(renderer, row)],
        output,
        on_validation=losses.append,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    scores: dict[str, Any] = {
        "base_loss": losses[0].validation_loss,
        "losses": [(row.step_number, row.validation_loss) for row in losses],
        "loss": losses[-1].validation_loss,
        "training_loss": result.training_loss,
        "num_tokens": result.num_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "torch": torch.__version__,
    }
    if arguments.answers:
        scores |= answer_scores(arguments, renderer, result.artifact, validation)
    shutil.rmtree(output)
    return scores


def answer_scores(
    arguments: argparse.Namespace,
    renderer: Renderer,
    artifact: Path,
    validation: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """Answer some validation records greedily and compare with the completions."""
    rows = validation[: arguments.answers]
    if arguments.method == "adapter":
        model = load_base(arguments.weights)
        set_adapter(model, load_adapter(artifact))
    else:
        model = load_base(artifact)
    answers = [
        renderer.decode(ids)
        for ids in greedy_answers(
            model,
            [renderer.render_prompt((Message("user", row["prompt"]),)) for row in rows],
            renderer.end_token_ids,
            ANSWER_TOKENS,
        )
    ]
    pairs = list(zip(answers, (row["completion"] for row in rows), strict=True))
    return {
        "rouge_l": statistics.mean(rouge_l(answer, wanted) for answer, wanted in pairs),
        "exact_match": statistics.mean(exact_match(answer, wanted) for answer, wanted in pairs),
        "median_words": statistics.median(len(words(answer)) for answer in answers),
    }


def read_rows(file: Path, num_records: int) -> list[dict[str, str]]:
    """Return so many records of a file, drawn by a fixed seed, in the order of the draw."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return random.Random(SEED).sample(rows, min(num_records, len(rows)))


def examples(renderer: Renderer, row: dict[str, str]) -> list[Example]:
    """Render one record, or one document, as the service does."""
    if "input" in row:
        return render_document(Document(row["input"], "", 0), renderer.tokenizer, DOCUMENT_TOKENS)
    messages = (Message("user", row["prompt"]), Message("assistant", row["completion"]))
    return [renderer.render_example(messages)]


def read_runs(work: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    file = work / "runs.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{"batch_size": 8, "epochs": 1} | json.loads(line) for line in lines]


def print_report(work: Path, svg: Path | None) -> None:
    """Print the validation losses as Markdown tables, and draw them."""
    runs = read_runs(work)
    for method in ("adapter", "full"):
        plain = [run for run in runs if is_curve_point(run, method)]
        if not plain:
            continue
        names = sorted({run["set"] for run in plain})
        rates = sorted({run["rate"] for run in plain})
        print(f"\nValidation loss, {method}\n")
        print("| rate | " + " | ".join(names) + " |")
        print("|---" * (len(names) + 1) + "|")
        base = {run["set"]: run["base_loss"] for run in plain}
        print("| base | " + " | ".join(f"{base[name]:.3f}" for name in names) + " |")
        for rate in rates:
            losses = {run["set"]: run["loss"] for run in plain if run["rate"] == rate}
            cells = [f"{losses[name]:.3f}" if name in losses else "" for name in names]
            print(f"| {rate:g} | " + " | ".join(cells) + " |")
    others = [run for run in runs if not is_curve_point(run, run["method"])]
    if others:
        print("\nOther runs\n\n| set | method | rate | batch | epochs | seed | validation loss | |")
        print("|---|---|---|---|---|---|---|---|")
    for run in others:
        answers = ""
        if run["answers"]:
            answers = (
                f"ROUGE-L {run['rouge_l']:.3f}, exact {run['exact_match']:.2f}, "
                f"median {run['median_words']:g} words"
            )
        keys = ("set", "method", "rate", "batch_size", "epochs", "seed")
        shown = " | ".join(str(run[key]) for key in keys)
        print(f"| {shown} | {run['loss']:.3f} | {answers} |")
    if svg is not None:
        svg.write_text(draw(runs), encoding="utf-8")


def is_curve_point(run: dict[str, Any], method: str) -> bool:
    """Return whether a run is one of those that differ in data set and rate only."""
    setting = {"method": method, "batch_size": 8, "epochs": 1, "seed": SEED, "answers": 0}
    return setting.items() <= run.items()


WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 30, 60
COLOURS = ("#0b6e99", "#b3541e", "#3d7d3a", "#7a3e8e")


def draw(runs: Sequence[dict[str, Any]]) -> str:
    """Return the curves as SVG: how much of the base's validation loss is left at each rate."""
    adapters = [run for run in runs if is_curve_point(run, "adapter")]
    rates = sorted({run["rate"] for run in adapters})
    names = sorted({run["set"] for run in adapters})
    left = {(run["set"], run["rate"]): run["loss"] / run["base_loss"] for run in adapters}
    low, high = math.log(rates[0]), math.log(rates[-1])

    def x(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(rate) - low) / (high - low)

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img" '
        'aria-label="Share of the base model\'s validation loss left after training, by rate">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tenth in range(0, 11, 2):
        at = y(tenth / 10)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tenth * 10} %</text>'
        )
    parts += [
        f'<text x="{x(rate):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{rate:g}</text>'
        for rate in rates
    ]
    for name, colour in zip(names, COLOURS, strict=False):
        points = [(x(rate), y(left[name, rate])) for rate in rates if (name, rate) in left]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3.5" fill="{colour}"/>'
            for across, down in points
        ]
        end = points[-1]
        parts.append(
            f'<text x="{end[0] + 10:.1f}" y="{end[1] + 4:.1f}" fill="{colour}">{name}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts += [
        f'<text x="{middle:.0f}" y="{HEIGHT - 15}" text-anchor="middle">'
        "learning rate of the adapter</text>",
        f'<text x="{LEFT}" y="{TOP - 12}">validation loss left, of the base model\'s</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
