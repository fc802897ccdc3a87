"""Does one page of work (see `training_work.py`) with Outcrop's own loop, and writes its result.

python -m benchmarks.outcrop_training WORK.json RESULT.json
python -m benchmarks.outcrop_training --start FOLDER WORK.json   writes the adapter's first values
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.training_work import peak_bytes, read_examples
from benchmarks.tricks import WITHOUT

from outcrop.models.catalog import LoraConfig, shipped_models
from outcrop.models.load import load_base
from outcrop.models.lora import adapter_of, attach, save_adapter
from outcrop.train.loop import train
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import TrainPlan, make_plan

BASE_MODEL = "huggingfacetb.smollm2-135m-instruct-v1:0"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Read the page and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, help="only write the adapter's first values there")
    parser.add_argument("work", type=Path)
    parser.add_argument("result", type=Path, nargs="?")
    arguments = parser.parse_args()
    work: dict[str, Any] = json.loads(arguments.work.read_text(encoding="utf-8"))
    if arguments.start:
        write_start(work, arguments.start)
        return
    arguments.result.write_text(json.dumps(run(work)), encoding="utf-8")


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train and return the result's page."""
    examples = read_examples(Path(work["examples"]))
    validation = read_examples(Path(work["validation"])) if work["validation"] else []
    options = dict(work["options"])
    if "without" in options:
        options |= WITHOUT[options.pop("without")](work["threads"])
    if "dtype" in options:
        options["dtype"] = TYPES[options["dtype"]]
    rows: list[StepRow] = []
    seconds: list[float] = []
    cpu: list[float] = []
    wall_mark, cpu_mark = time.perf_counter(), time.process_time()

    def note(row: StepRow) -> None:
        nonlocal wall_mark, cpu_mark
        wall_now, cpu_now = time.perf_counter(), time.process_time()
        seconds.append(wall_now - wall_mark)
        cpu.append(cpu_now - cpu_mark)
        rows.append(row)
        wall_mark, cpu_mark = wall_now, cpu_now

    validations: list[ValidationRow] = []
    output = Path(work["output"] or tempfile.mkdtemp(prefix="outcrop-bench-"))
    try:
        result = train(
            make_work_plan(work),
            Path(work["weights"]),
            examples,
            validation,
            output,
            on_step=note,
            on_validation=validations.append,
            seed=work["seed"],
            threads=work["threads"],
            **options,
        )
    finally:
        if not work["output"]:
            shutil.rmtree(output, ignore_errors=True)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": [row.num_tokens for row in rows],
        "losses": [row.training_loss for row in rows],
        "validation": [(row.step_number, row.validation_loss) for row in validations],
        "peak": peak_bytes(),
        "artifact": str(result.artifact) if work["output"] else None,
        "digest": result.digest,
        "threads": torch.get_num_threads(),
    }


def make_work_plan(work: dict[str, Any]) -> TrainPlan:
    """Return the catalogue's plan, or one with the numbers of the work in their places."""
    models = {model.model_id: model for model in shipped_models()}
    if work["catalogue"]:
        return make_plan(
            models[work["catalogue"]["base_model"]],
            "FINE_TUNING",
            work["catalogue"]["hyper_parameters"],
            has_validation=bool(work["validation"]),
        )
    plan = make_plan(models[BASE_MODEL], "FINE_TUNING", {}, has_validation=True)
    return replace(
        plan,
        method=work["method"],
        num_epochs=work["epochs"],
        batch_size=work["batch_size"],
        learning_rate=work["learning_rate"],
        warmup_steps=0,
        lora_rank=work["rank"],
        lora_alpha=work["alpha"],
        early_stopping=None,
        evaluation_percentage=None,
    )


def write_start(work: dict[str, Any], folder: Path) -> None:
    """Write the adapter that a run with this seed starts from, in peft's layout."""
    plan = make_work_plan(work)
    model = load_base(Path(work["weights"]))
    config = LoraConfig(plan.lora_rank, plan.lora_alpha, plan.lora_targets)
    attach(model, config, work["seed"])
    save_adapter(adapter_of(model, config), folder, plan.base_model)


if __name__ == "__main__":
    main()
