"""Are the catalogue's defaults as good as the best of a small sweep with TRL?

    python -m benchmarks.defaults_sweep run --trl-python PYTHON --data FOLDER --work FOLDER
    python -m benchmarks.defaults_sweep report --work FOLDER

For each data set: 300 training records. TRL trains at three learning rates with one seed; the rate
with the lowest validation loss wins and is trained with two more seeds. Outcrop trains with the
catalogue's defaults, three seeds, on as many tokens. Then each final model meets the test records,
once. All models are scored by the same code on the same tokens (`score_model.py`).

It takes hours and may be interrupted: every finished run is a line of WORK/runs.jsonl, every test a
line of WORK/tests.jsonl, and neither is done again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.running import table_lines, write_result
from benchmarks.score_model import Scoring, score
from benchmarks.training_work import (
    Contender,
    Work,
    run_work,
    shipped_weights,
    write_examples,
)

from outcrop.data.records import Example, Message
from outcrop.data.render import Renderer
from outcrop.evaluate.generation import exact_match, rouge_l
from outcrop.models.catalog import shipped_models
from outcrop.models.load import has_fast_bfloat16
from outcrop.train.plan import make_plan

BASE_MODEL = "amazon.titan-text-express-v1"
RATES = (1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)
SAMPLE_SEED = 0
# As the fastest setting that was found, in the type that this processor multiplies faster.
TRL = Contender(
    "TRL",
    "trl",
    {
        "padding_free": True,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": has_fast_bfloat16(),
        "model_init_kwargs": {"dtype": "bfloat16" if has_fast_bfloat16() else "float32"},
    },
)
OUTCROP = Contender("Outcrop")
Record = dict[str, str]
_NUMBER = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Task:
    """What a data set asks for."""

    metric: str
    measure: Callable[[str, str], float]
    """Of an answer and the one that was wanted, from 0 to 1."""
    answer_tokens: int


def same_number(answer: str, wanted: str) -> float:
    """Return whether the number behind `####` is the right one."""
    found, right = _NUMBER.search(answer), _NUMBER.search(wanted)
    assert right is not None
    if found is None:
        return 0.0
    return float(found[1].replace(",", "") == right[1].replace(",", ""))


TASKS: Mapping[str, Task] = {
    "banking77": Task("right label", exact_match, 24),
    "ja-jcommonsenseqa": Task("right choice", exact_match, 32),
    "gsm8k": Task("right number", same_number, 256),
    "mts-dialog": Task("ROUGE-L", rouge_l, 128),
}


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--trl-python", type=Path, required=True)
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--work", type=Path, required=True)
    run.add_argument("--weights", type=Path, help="the base; default: the shipped model")
    run.add_argument("--sets", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    run.add_argument("--rates", nargs="+", type=float, default=RATES)
    run.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    run.add_argument("--base-model", default=BASE_MODEL, help="whose defaults are taken")
    run.add_argument("--epochs", type=int, help="instead of the family's default, for both sides")
    run.add_argument("--records", type=int, default=300)
    run.add_argument("--validation-records", type=int, default=100)
    run.add_argument("--test-records", type=int, default=150)
    run.add_argument("--answers", type=int, default=150, help="test records that are answered too")
    run.add_argument("--threads", type=int, default=2)
    report = commands.add_parser("report")
    report.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "run":
        for name in options.sets:
            Sweep(options, name).run()
    else:
        write_report(options.work)


class Sweep:
    """All runs on one data set."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        """Render the records and write them down for the trainers."""
        self.options, self.name, self.task = options, name, TASKS[name]
        self.weights = shipped_weights(options.weights)
        self.renderer = Renderer(self.weights)
        self.folder = options.work / name
        training = read_records(options.data / f"{name}-train.jsonl", options.records)
        validation = read_records(
            options.data / f"{name}-validation.jsonl", options.validation_records
        )
        self.test = read_records(options.data / f"{name}-test.jsonl", options.test_records)
        self.validation_file = self.write("validation", validation)
        self.test_file = self.write("test", self.test)
        given = {"epochCount": str(options.epochs)} if options.epochs else {}
        self.catalogue = {"base_model": options.base_model, "hyper_parameters": given}
        base = next(one for one in shipped_models() if one.model_id == options.base_model)
        plan = make_plan(base, "FINE_TUNING", given, has_validation=True)
        self.work = Work(
            weights=str(self.weights),
            examples=self.write("training", training),
            # Only a family that stops early looks at them while it trains.
            validation=self.validation_file if plan.early_stopping else None,
            epochs=plan.num_epochs,
            threads=options.threads,
        )
        self.setting = {
            "set": name,
            "records": options.records,
            "validation_records": options.validation_records,
            "epochs": plan.num_epochs,
            "base_model": options.base_model,
        }

    def run(self) -> None:
        """Do what is not done yet: the sweep, the seeds, the tests."""
        first = self.options.seeds[0]
        sweep = [self.train(TRL, rate, first) for rate in self.options.rates]
        winner = min(sweep, key=lambda run: run["validation_loss"])["rate"]
        finals = [self.train(TRL, winner, seed) for seed in self.options.seeds]
        finals += [self.train(OUTCROP, None, seed) for seed in self.options.seeds]
        self.check({**self.setting, "trainer": "base", "rate": None, "seed": None}, None)
        for final in finals:
            key = {name: final[name] for name in (*self.setting, "trainer", "rate", "seed")}
            self.check(key, final["artifact"])

    def train(self, trainer: Contender, rate: float | None, seed: int) -> dict[str, Any]:
        """Return the line of one run, which is made where there is none yet."""
        key = {**self.setting, "trainer": trainer.name, "rate": rate, "seed": seed}
        done = find_line(self.options.work / "runs.jsonl", key)
        if done is not None:
            return done
        output = (
            self.folder / f"{trainer.name}-{'defaults' if rate is None else f'{rate:g}'}-{seed}"
        )
        shutil.rmtree(output, ignore_errors=True)
        work = replace(self.work, seed=seed, output=str(output))
        if rate is None:
            work = replace(work, catalogue=self.catalogue)
        else:
            work = replace(work, learning_rate=rate, validation=None)
        result = run_work(work, trainer, self.options.trl_python, self.folder / "last")
        loss = self.score(result["artifact"], self.validation_file)["loss"]
        line = key | {
            "artifact": result["artifact"],
            "validation_loss": loss,
            "training_losses": result["losses"],
            "num_tokens": round(sum(result["tokens"])),
            "seconds": round(sum(result["seconds"]), 1),
        }
        return add_line(self.options.work / "runs.jsonl", line)

    def check(self, key: dict[str, Any], artifact: str | None) -> None:
        """Let a final model meet the test records, if it has not yet."""
        file = self.options.work / "tests.jsonl"
        answered = self.test[: self.options.answers]
        key = key | {"test_records": len(self.test), "answered": len(answered)}
        if find_line(file, key) is not None:
            return
        prompts = [
            self.renderer.render_prompt((Message("user", record["prompt"]),)) for record in answered
        ]
        found = self.score(artifact, self.test_file, prompts)
        answers = [self.renderer.decode(ids) for ids in found["answers"]]
        scores = [
            self.task.measure(answer, record["completion"])
            for answer, record in zip(answers, answered, strict=True)
        ]
        loss, metric = found["loss"], statistics.mean(scores)
        add_line(file, key | {"loss": loss, "metric": metric, "answers": answers})

    def score(
        self, artifact: str | None, examples: str, prompts: Sequence[Sequence[int]] = ()
    ) -> dict[str, Any]:
        """Score one model by the code that scores all of them."""
        scoring = Scoring(
            str(self.weights),
            artifact,
            examples,
            prompts=prompts,
            end_token_ids=self.renderer.end_token_ids,
            answer_tokens=self.task.answer_tokens,
            threads=self.options.threads,
        )
        return score(scoring, self.folder / "last")

    def write(self, role: str, records: Sequence[Record]) -> str:
        """Render records as the service does and write them down."""
        examples: list[Example] = [
            self.renderer.render_example(
                (Message("user", record["prompt"]), Message("assistant", record["completion"]))
            )
            for record in records
        ]
        return str(write_examples(self.folder / f"{role}.json", examples))


def read_records(file: Path, count: int) -> list[Record]:
    """Return so many records of a file, drawn by a fixed seed."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return random.Random(SAMPLE_SEED).sample(rows, min(count, len(rows)))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return what is done already; a line that was cut off by a kill does not count."""
    lines = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def find_line(file: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the line that has these values, or None."""
    return next((line for line in read_lines(file) if key.items() <= line.items()), None)


def add_line(file: Path, line: dict[str, Any]) -> dict[str, Any]:
    """Append a line, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = not file.exists() or not (text := file.read_bytes()) or text.endswith(b"\n")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(("" if whole else "\n") + json.dumps(line, ensure_ascii=False) + "\n")
    shown = {name: value for name, value in line.items() if name not in ("answers", "artifact")}
    shown.pop("training_losses", None)
    print(json.dumps(shown), flush=True)
    return line


def write_report(work: Path) -> None:
    """Write the table of the final models, and below it that of the sweep."""
    runs, tests = read_lines(work / "runs.jsonl"), read_lines(work / "tests.jsonl")
    if not tests:
        raise SystemExit("no final model has met its test records yet")
    rows: list[tuple[str, ...]] = [
        ("data", "model", "test loss, nats a token", "metric", "score", "tokens a run", "minutes")
    ]
    verdicts = []
    for name in dict.fromkeys(test["set"] for test in tests):
        mine = [test for test in tests if test["set"] == name]
        for trainer in ("base", "TRL", "Outcrop"):
            finals = [test for test in mine if test["trainer"] == trainer]
            if not finals:
                continue
            made = [run for run in runs if any(is_of(test, run) for test in finals)]
            label = {"TRL": f"TRL at {finals[0]['rate']}", "Outcrop": "Outcrop, defaults"}
            rows.append(
                (
                    name,
                    label.get(trainer, trainer),
                    spread([test["loss"] for test in finals], "{:.3f}"),
                    TASKS[name].metric,
                    spread([test["metric"] for test in finals], "{:.3f}"),
                    str(made[0]["num_tokens"]) if made else "",
                    f"{statistics.mean(run['seconds'] for run in made) / 60:.1f}" if made else "",
                )
            )
        verdicts += verdict(name, mine)
    sweep: list[tuple[str, ...]] = [("data", "TRL's rate", "seed", "validation loss")]
    sweep += [
        (run["set"], f"{run['rate']:g}", str(run["seed"]), f"{run['validation_loss']:.4f}")
        for run in runs
        if run["trainer"] == "TRL"
    ]
    one, test = runs[0], tests[0]
    write_result(
        "defaults_sweep",
        f"{one['records']} training, {one['validation_records']} validation and up to "
        f"{test['test_records']} test records of each set, drawn by a fixed seed, of which up to "
        f"{test['answered']} are answered too; "
        f"{one['epochs']} epochs, the default of {one['base_model']}. TRL: adapters of rank 16 and "
        "alpha 32 on all linear layers, batches of 8, its own shuffling and first values, its rate "
        "falling linearly, padding-free, no checkpointing; the rate with the lowest validation "
        "loss at the first seed won. Outcrop: the catalogue's defaults as they are. Both train on "
        "the same tokens. Test records were met once by each final model. Losses are over the "
        "completions' tokens; answers are greedy. Mean and standard deviation over the seeds.",
        rows,
        "\n".join([*verdicts, "", "## The sweep", "", *table_lines(sweep)]),
    )


def is_of(test: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Return whether a test is that of a run's model."""
    keys = ("set", "trainer", "rate", "seed", "epochs", "records", "base_model")
    return all(test[key] == run[key] for key in keys)


def verdict(name: str, tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how far Outcrop's mean is from TRL's, next to the noise of both."""
    lines = []
    for what, sign in (("loss", 1.0), ("metric", -1.0)):
        mine, theirs = (
            [test[what] for test in tests if test["trainer"] == trainer]
            for trainer in ("Outcrop", "TRL")
        )
        if len(mine) < 2 or len(theirs) < 2:
            continue
        worse = sign * (statistics.mean(mine) - statistics.mean(theirs))
        noise = sum(statistics.variance(part) / len(part) for part in (mine, theirs)) ** 0.5
        word = "worse" if worse > 2 * noise else "not worse"
        shown = "test loss" if what == "loss" else TASKS[name].metric
        lines.append(
            f"- {name}, {shown}: Outcrop is {word}: the means differ by {abs(worse):.3f} "
            f"{'against it' if worse > 0 else 'in its favour'}; two standard errors of that are "
            f"{2 * noise:.3f}."
        )
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation as text."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
