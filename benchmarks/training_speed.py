"""Outcrop and TRL train on the same records, in the same order, on the same machine, in turn.

    python -m benchmarks.training_speed --trl-python FOLDER/bin/python
    python -m benchmarks.training_speed --trl-python FOLDER/bin/python --method full
    python -m benchmarks.training_speed --trl-python FOLDER/bin/python --data cpt --steps 6
    python -m benchmarks.training_speed --trl-python FOLDER/bin/python --search --rounds 1
    python -m benchmarks.training_speed --ladder

Each contender is a process of its own that ends before the next one begins: A B C A B C ... Each
round has a window of the records of its own, the same for all. Beside the speed it compares the
losses of the first steps, and the validation loss at the end of them, with a plain float32 loop.
Everybody computes in the type that this processor multiplies faster: TRL too is told to take
float32 where there are no bfloat16 products, whatever its setting is called. Without --trl-python
only Outcrop is measured. How to make TRL's environment stands in `requirements-trl.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.aws_operations import operation_examples
from benchmarks.running import (
    RESULTS,
    busy_seconds,
    child_seconds,
    table_lines,
    write_result,
)
from benchmarks.score_model import Scoring, score
from benchmarks.training_work import (
    CACHE,
    OWN_MODULE,
    ROOT,
    SHARED_DATA,
    Contender,
    Work,
    run_work,
    shipped_weights,
    step_flops,
    write_examples,
)
from benchmarks.tricks import WITHOUT

from outcrop.data.records import Example
from outcrop.data.render import Renderer
from outcrop.models.load import has_fast_bfloat16
from outcrop.train.threads import ENVIRONMENT

NUM_RECORDS, NUM_VALIDATION = 1500, 100
DOCUMENT_TOKENS = 1024
"""Documents of continued pre-training are cut at so many tokens, for both sides alike."""
DOCUMENTS = "cpt-aws-s3-guide.jsonl"
LEARNING_RATES = {"adapter": 2e-4, "full": 2e-5}
OUTCROP = Contender("Outcrop")
REFERENCE = Contender("plain float32 loop", "reference")
OWN_REFERENCE = Contender("Outcrop in float32", options={"dtype": "float32"})

FAST_TYPE = "bfloat16" if has_fast_bfloat16() else "float32"
_KEPT = {"gradient_checkpointing": False}
_FREE = {"padding_free": True, "max_length": None, **_KEPT}
_BF16 = {"model_init_kwargs": {"dtype": "bfloat16"}}
_BEST: Mapping[str, Any] = {**_FREE, **_BF16}
_PACKED = {
    "packing": True,
    "max_length": DOCUMENT_TOKENS,
    # Several packed rows in one pass would be one long row with scores between all its tokens.
    "per_device_train_batch_size": 1,
}
TRL_DEFAULTS = Contender("TRL, its defaults", "trl")
RIVALS: Mapping[tuple[str, str], tuple[Contender, ...]] = {
    ("operations", "adapter"): (TRL_DEFAULTS, Contender("TRL, best", "trl", _BEST)),
    # Where all weights are trained, bfloat16 ones without float32 masters would hardly move.
    ("operations", "full"): (TRL_DEFAULTS, Contender("TRL, best", "trl", _FREE)),
    ("cpt", "adapter"): (
        Contender("TRL, packing", "trl", _PACKED),
        Contender("TRL, best packing", "trl", {**_PACKED, **_BF16, **_KEPT}),
    ),
    ("cpt", "full"): (
        Contender("TRL, packing", "trl", _PACKED),
        Contender("TRL, best packing", "trl", {**_PACKED, **_KEPT}),
    ),
}
"""Whom Outcrop is compared with: TRL as it comes, and the fastest setting that --search found."""

SEARCH = {
    "operations": (
        TRL_DEFAULTS,
        Contender("TRL, no checkpointing", "trl", _KEPT),
        Contender("TRL, no checkpointing, bfloat16 weights", "trl", {**_KEPT, **_BF16}),
        Contender("TRL, padding-free", "trl", {"padding_free": True, "max_length": None}),
        Contender("TRL, padding-free, no checkpointing", "trl", _FREE),
        Contender("TRL, padding-free, no checkpointing, bfloat16 weights", "trl", _BEST),
        Contender(
            "the same, 2 x 4 records",
            "trl",
            {**_BEST, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        ),
        Contender("the same, torch.compile", "trl", {**_BEST, "torch_compile": True}),
        Contender("the same, threads that sleep while they wait", "trl", _BEST, ENVIRONMENT),
    ),
    "cpt": (
        Contender("TRL, packing", "trl", _PACKED),
        Contender("TRL, packing, no checkpointing", "trl", {**_PACKED, **_KEPT}),
        Contender(
            "TRL, packing, no checkpointing, bfloat16 weights", "trl", {**_PACKED, **_KEPT, **_BF16}
        ),
        Contender(
            "the same, threads that sleep while they wait",
            "trl",
            {**_PACKED, **_KEPT, **_BF16},
            ENVIRONMENT,
        ),
    ),
}
"""TRL's settings that change its speed and not which records make a step."""

LADDER: Mapping[str, Contender] = {
    "bfloat16": Contender("float32", options={"dtype": "float32"}),
    "threads that sleep while they wait": Contender(
        "spinning threads", environment={"OMP_WAIT_POLICY": "ACTIVE"}
    ),
    **{name: Contender(name, options={"without": name}) for name in WITHOUT},
}
"""Name of what is turned off -> Outcrop without it: other environment, or other arguments of
`train(...)`. One entry a trick; the ladder's table has one row for each, in this order."""


@dataclass(frozen=True)
class Measured:
    """One run of one contender."""

    tokens_per_second: float
    tokens_per_cpu_second: float
    peak_bytes: int
    first_step_seconds: float
    """From the start of the trainer to the end of its first step: loading and compiling too."""
    others: float
    """Cores that other processes of the machine kept busy meanwhile."""


def main() -> None:
    """Measure what the command line says and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trl-python", type=Path, help="the interpreter of TRL's environment")
    parser.add_argument("--weights", type=Path, help="the base; default: the shipped model")
    parser.add_argument("--method", choices=("adapter", "full"), default="adapter")
    parser.add_argument("--data", choices=("operations", "cpt"), default="operations")
    parser.add_argument(
        "--data-dir", type=Path, default=SHARED_DATA, help=f"folder of {DOCUMENTS}, for cpt"
    )
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, warm-up included")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loss-steps", type=int, default=20, help="0: losses are not compared")
    parser.add_argument("--only-losses", action="store_true", help="speed is not measured")
    parser.add_argument("--best-only", action="store_true", help="of TRL, the best setting only")
    parser.add_argument("--ladder", action="store_true", help="Outcrop without one trick each")
    parser.add_argument("--search", action="store_true", help="which setting of TRL is fastest")
    parser.add_argument("--work", type=Path, default=CACHE / "training_speed")
    options = parser.parse_args()
    if not 0 < options.warm_up < options.steps:
        parser.error("--warm-up must be from 1 to --steps - 1")
    if options.search and not options.trl_python:
        parser.error("--search needs --trl-python")

    weights = shipped_weights(options.weights)
    examples, validation = make_examples(options, weights)
    lines: list[str] = []
    table: list[tuple[str, ...]] = []
    if not options.only_losses:
        chosen = choose_contenders(options)
        runs, rates = measure(options, weights, examples, chosen)
        table, lines = speed_table(options, weights, chosen, runs, rates)
    if options.loss_steps and not (options.ladder or options.search) and options.data != "cpt":
        loss_table, loss_notes = compare_losses(options, weights, examples, validation)
        if table:
            lines += ["", "## Losses", "", *table_lines(loss_table), "", *loss_notes]
        else:
            table, lines = loss_table, loss_notes
    write_result(subject(options), describe(options, examples), table, "\n".join(lines))


def subject(options: argparse.Namespace) -> str:
    """Return the name of the result's page."""
    parts = ["training_speed"]
    parts += [options.method] if options.method != "adapter" else []
    parts += [options.data] if options.data != "operations" else []
    parts += [name for name in ("ladder", "search") if getattr(options, name)]
    parts += ["losses"] if options.only_losses else []
    parts += ["float32"] if FAST_TYPE == "float32" else []
    return "_".join(parts)


def choose_contenders(options: argparse.Namespace) -> list[Contender]:
    """Return who takes part, the one that the others are compared with first."""
    if options.ladder:
        without = [replace(one, name=f"without: {name}") for name, one in LADDER.items()]
        return [OUTCROP, *without]
    if options.search:
        return in_batches(options, SEARCH[options.data])
    return [OUTCROP, *rivals(options)]


def rivals(options: argparse.Namespace) -> list[Contender]:
    """Return whom Outcrop is compared with; nobody without TRL's environment."""
    if not options.trl_python:
        return []
    found = RIVALS[options.data, options.method]
    return in_batches(options, found[-1:] if options.best_only else found)


def in_batches(options: argparse.Namespace, given: Sequence[Contender]) -> list[Contender]:
    """Return the contenders so that those who pack take as many rows a step as others records,
    and all compute in the faster type.
    """
    found = []
    for one in given:
        setting = dict(one.options)
        if setting.get("packing"):
            setting["gradient_accumulation_steps"] = options.batch_size
        if one.trainer == "trl" and FAST_TYPE == "float32":
            setting |= {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}
        found.append(replace(one, options=setting))
    return found


def make_examples(
    options: argparse.Namespace, weights: Path
) -> tuple[list[Example], list[Example]]:
    """Return the records to train on and those to validate on."""
    renderer = Renderer(weights)
    if options.data == "operations":
        examples = operation_examples(renderer, NUM_RECORDS + NUM_VALIDATION)
        return examples[:NUM_RECORDS], examples[NUM_RECORDS:]
    file = options.data_dir / DOCUMENTS
    if not file.is_file():
        raise SystemExit(f"{DOCUMENTS} is not in the folder that --data-dir names")
    documents = []
    (end,) = renderer.end_token_ids[-1:]
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = [*renderer.tokenizer.encode(json.loads(line)["input"]), end]
        for first in range(0, len(ids), DOCUMENT_TOKENS):
            part = ids[first : first + DOCUMENT_TOKENS]
            if len(part) > 1:
                documents.append(Example(part, [True] * len(part)))
    return documents[NUM_VALIDATION:], documents[:NUM_VALIDATION]


def make_work(
    options: argparse.Namespace,
    weights: Path,
    examples: Sequence[Example],
    folder: Path,
) -> Work:
    """Write the records and the adapter's first values, and return the work on them."""
    from outcrop.train.batches import shuffled

    work = Work(
        weights=str(weights),
        examples=str(write_examples(folder / "examples.json", examples)),
        order=shuffled(len(examples), 0, 0),
        method=options.method,
        rank=options.rank,
        alpha=2.0 * options.rank,
        learning_rate=LEARNING_RATES[options.method],
        batch_size=options.batch_size,
        threads=options.threads,
    )
    if options.method == "full":
        return work
    start = folder.parent / "start"
    page = folder / "start.json"
    page.write_text(json.dumps(work.__dict__ | {"options": {}}), encoding="utf-8")
    command = [sys.executable, "-m", OWN_MODULE, "--start", str(start), str(page)]
    subprocess.run(command, cwd=ROOT, check=True)
    return replace(work, start=str(start))


def measure(
    options: argparse.Namespace,
    weights: Path,
    examples: Sequence[Example],
    chosen: Sequence[Contender],
) -> tuple[dict[str, list[Measured]], list[dict[str, float]]]:
    """Return each contender's runs, one a round, and the machine's matrix rate in each round."""
    runs: dict[str, list[Measured]] = {one.name: [] for one in chosen}
    rates = []
    window = options.steps * options.batch_size
    for number in range(options.rounds):
        first = number * window % max(1, len(examples) - window + 1)
        folder = options.work / f"round-{number}"
        work = make_work(options, weights, examples[first : first + window], folder)
        rates.append(matrix_rate(weights, options.threads))
        for place, one in enumerate(chosen):
            if one.name not in runs:
                continue
            where = folder / str(place)
            try:
                found = measure_one(work, one, options.trl_python, where, options.warm_up)
            except SystemExit as error:
                if not (options.ladder or options.search) or one is chosen[0]:
                    raise
                print(f"left out from here on: {error}", flush=True)
                del runs[one.name]
                continue
            runs[one.name].append(found)
            print(f"round {number + 1}, {one.name}: {found}", flush=True)
    return runs, rates


def measure_one(
    work: Work, one: Contender, trl_python: Path | None, folder: Path, warm_up: int
) -> Measured:
    """Run one contender once."""
    busy, own, started = busy_seconds(), child_seconds(), time.perf_counter()
    result = run_work(work, one, trl_python, folder)
    wall = time.perf_counter() - started
    others = (busy_seconds() - busy - (child_seconds() - own)) / wall
    if len(result["seconds"]) <= warm_up:
        raise SystemExit(f"{one.name} did {len(result['seconds'])} steps: take more --steps")
    tokens = sum(result["tokens"][warm_up:])
    return Measured(
        tokens / sum(result["seconds"][warm_up:]),
        tokens / sum(result["cpu"][warm_up:]),
        result["peak"],
        result["seconds"][0],
        max(0.0, others),
    )


def matrix_rate(weights: Path, threads: int) -> dict[str, float]:
    """Return the matrix rate now in the faster type, on the shapes of the layers."""
    config = str(weights / "config.json")
    command = [sys.executable, "-m", "benchmarks.matrix_rate", config, "--threads", str(threads)]
    command += ["--dtype", FAST_TYPE]
    answer = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, check=True
    )
    rate: dict[str, float] = json.loads(answer.stdout)
    return rate


def speed_table(
    options: argparse.Namespace,
    weights: Path,
    chosen: Sequence[Contender],
    runs: Mapping[str, Sequence[Measured]],
    rates: Sequence[Mapping[str, float]],
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the table of medians and what is to be said below it."""
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    flops = step_flops(config, options.method, options.rank)
    rate = statistics.median(found["median"] for found in rates)
    best = max(found["best"] for found in rates)
    first = runs[chosen[0].name]
    name = "the first" if options.search else "Outcrop"
    table: list[tuple[str, ...]] = [
        (
            "contender",
            "tokens/s",
            "lowest to highest",
            f"{name} is faster",
            "tokens per CPU second",
            f"{name} is faster",
            "peak memory, MB",
            f"{name}'s share",
            f"of the {FAST_TYPE} matrix rate",
            "first step done after",
            "other load, cores",
        )
    ]
    for one in chosen:
        if one.name not in runs:
            table.append((one.name, "failed", *[""] * 9))
            continue
        found = runs[one.name]
        speeds = [run.tokens_per_second for run in found]
        speed = statistics.median(speeds)
        peak = max(run.peak_bytes for run in found)
        table.append(
            (
                one.name,
                f"{speed:.1f}",
                f"{min(speeds):.1f} to {max(speeds):.1f}",
                f"{paired(first, found, 'tokens_per_second'):.2f}x",
                f"{statistics.median(run.tokens_per_cpu_second for run in found):.1f}",
                f"{paired(first, found, 'tokens_per_cpu_second'):.2f}x",
                f"{peak / 1e6:.0f}",
                f"{max(run.peak_bytes for run in first) / peak:.2f}",
                f"{speed * flops / rate:.0%}",
                f"{statistics.median(run.first_step_seconds for run in found):.1f} s",
                f"{statistics.median(run.others for run in found):.2f}",
            )
        )
    shown = ", ".join(f"{found['median'] / 1e9:.0f}" for found in rates)
    notes = [
        f"- Useful operations a token: {flops / 1e6:.0f} MFLOP: the linear layers"
        + (" and the adapters" if options.method == "adapter" else "")
        + ", forward and backward; no attention, no head, no padding. Work that a trainer saves "
        "where records begin alike still counts.",
        f"- Machine's {FAST_TYPE} matrix rate, {options.threads} threads, same shapes, 1,024 "
        f"tokens, before each round: {shown} GF/s (median of each product); the median of those "
        f"is what shares refer to. Best of each product, best round: {best / 1e9:.0f} GF/s, of "
        f"which {chosen[0].name} uses "
        f"{statistics.median(run.tokens_per_second for run in first) * flops / best:.0%}.",
        "- `faster` is the median of the rounds' own ratios; memory is the largest of all rounds.",
    ]
    return table, notes


def paired(first: Sequence[Measured], others: Sequence[Measured], what: str) -> float:
    """Return the median over the rounds of how much more the first one does."""
    ratios: list[float] = [
        getattr(mine, what) / getattr(theirs, what)
        for mine, theirs in zip(first, others, strict=True)
    ]
    return statistics.median(ratios)


def compare_losses(
    options: argparse.Namespace,
    weights: Path,
    examples: Sequence[Example],
    validation: Sequence[Example],
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the table of losses against the plain float32 loop, and what is to be said of it."""
    folder = options.work / "losses"
    chosen = [OWN_REFERENCE, OUTCROP]
    if options.trl_python:
        chosen = [REFERENCE, *chosen, *rivals(options)]
    work = make_work(options, weights, examples[: options.loss_steps * options.batch_size], folder)
    validation_file = write_examples(folder / "validation.json", validation)
    losses: dict[str, list[float]] = {}
    final: dict[str, float] = {}
    for place, one in enumerate(chosen):
        output = folder / f"{place}-output"
        result = run_work(
            replace(work, output=str(output)), one, options.trl_python, folder / str(place)
        )
        losses[one.name] = result["losses"]
        scoring = Scoring(
            str(weights), result["artifact"], str(validation_file), "float32", threads=work.threads
        )
        final[one.name] = score(scoring, folder / str(place))["loss"]
        print(f"losses, {one.name}: {final[one.name]:.4f} at the end", flush=True)
    save_losses(options, losses, final)
    reference, *others = [one.name for one in chosen]
    table: list[tuple[str, ...]] = [("step", reference, *others)]
    for step, wanted in enumerate(losses[reference][:20]):
        cells = [f"{losses[name][step] / wanted - 1:+.2%}" for name in others]
        table.append((str(step), f"{wanted:.4f}", *cells))
    worst = [
        max(
            abs(mine / wanted - 1)
            for mine, wanted in zip(losses[name], losses[reference], strict=True)
        )
        for name in others
    ]
    table.append((f"largest of {options.loss_steps}", "", *(f"{share:.2%}" for share in worst)))
    wanted = final[reference]
    ends = [f"{final[name] / wanted - 1:+.2%}" for name in others]
    table.append(("validation, after the last", f"{wanted:.4f}", *ends))
    return table, [
        f"- Differences from the {reference}. Same records, order, first values of the adapter, "
        "learning rate (falling linearly to zero), AdamW without decay, gradient cut at length 1; "
        "the loss of a step is the mean over the tokens of its batch that carry loss, before the "
        "update. TRL logs losses with four decimals.",
        f"- Validation: {len(validation)} other records, each model scored by the same code "
        "(`score_model.py`) with float32 weights.",
    ]


def save_losses(
    options: argparse.Namespace, losses: Mapping[str, list[float]], final: Mapping[str, float]
) -> None:
    """Write the curves beside the result's page; `loss_curves.py` draws them."""
    name = f"{datetime.now(UTC):%Y-%m-%d}_{os.cpu_count()}-cores_training_losses"
    name += f"_{options.method}" if options.method != "adapter" else ""
    RESULTS.mkdir(exist_ok=True)
    page = {"learning_rate": LEARNING_RATES[options.method], "losses": losses, "validation": final}
    (RESULTS / f"{name}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


def describe(options: argparse.Namespace, examples: Sequence[Example]) -> str:
    """Say how the numbers were read."""
    lengths = [len(example.input_ids) for example in examples]
    kind = (
        f"{len(examples)} descriptions of AWS operations out of botocore, as prompt and completion"
        if options.data == "operations"
        else f"{len(examples)} pieces of {DOCUMENTS}, cut at {DOCUMENT_TOKENS} tokens, loss on all"
    )
    what = f"adapters of rank {options.rank} on all linear layers"
    return (
        f"SmolLM2-135M-Instruct, {what if options.method == 'adapter' else 'all weights'}, batches "
        f"of {options.batch_size}, {options.threads} threads. {kind}: {min(lengths)} to "
        f"{max(lengths)} tokens, {statistics.mean(lengths):.0f} in the mean. "
        f"{options.rounds} rounds; in each, every contender in a process of its own, one after the "
        f"other, does {options.steps} steps on the same records in the same order, and the time "
        f"after the first {options.warm_up} counts, with everything between the steps. Only real "
        "tokens count, none of padding. Medians over the rounds."
    )


if __name__ == "__main__":
    main()
